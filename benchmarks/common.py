"""What the benchmarks share: bases of two sizes, interleaved timing, and the table of results.

Machines are noisy, so only ratios within one run are claimed: ours and the reference take turns, and the median of
the rounds counts. One thread, fp32, no dropout.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES: dict[str, dict] = {
    "SMALL": {"n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 4096, "n_positions": 2048},
    "MEDIUM": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 49152, "n_positions": 2048},
    # As wide and deep as SMALL, of another family, and with as many weights in a layer.
    "SMALL_LLAMA": {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 683,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    },
}


def random_base(size: str, folder: Path) -> Path:
    """Save a random model of a size to `folder`."""
    torch.manual_seed(0)
    settings = {"model_type": "gpt_bigcode", "bos_token_id": 0, "eos_token_id": 0, **SIZES[size]}
    settings |= NO_DROPOUT if settings["model_type"] == "gpt_bigcode" else {}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder / size)
    return folder / size


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call over `rounds` in which all take turns, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def replace_rows(file: Path, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Put rows into a file of results, in place of those that are the same in `columns`."""

    def of(row: dict[str, Any]) -> tuple:
        return tuple(row.get(column) for column in columns)

    old = json.loads(file.read_text()) if file.is_file() else []
    measured = set(map(of, rows))
    file.write_text(json.dumps([row for row in old if of(row) not in measured] + rows, indent=1) + "\n")


class Results:
    """Rows of `{row, ours, reference, ratio, unit, settings}`, printed as they come and written as JSON."""

    def __init__(self, name: str):
        self.file = RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        print(f"{'row':28} {'ours':>12} {'reference':>12} {'ratio':>8}  unit / settings")

    def add(self, row: str, ours: float, reference: float, ratio: float, unit: str, **settings: Any) -> None:
        self.rows.append(
            {
                "row": row,
                "ours": ours,
                "reference": reference,
                "ratio": ratio,
                "unit": unit,
                "settings": settings,
            }
        )
        details = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{row:28} {ours:12.5g} {reference:12.5g} {ratio:8.3f}  {unit} / {details}", flush=True)

    def write(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(self.file)
