"""Gather the rows of benchmarks/results/real.json: systems on the real base, from the scores that their runs left.

    python benchmarks/real_table.py merged=RUN,SCORES lora_prompted=FINETUNED,SCORES prompted=,SCORES ...

SCORES is a folder of what `dssk evaluate` or `dssk compare` wrote, named `<set>*.json` or `scores-<set>-<system>.json`.
RUN is a run's folder, or that of a model that compare fine-tuned; empty where nothing was trained. A score that is not
there makes no row; rows of other systems, sets and seeds stay.
"""

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import dssk  # noqa: F401 - makes the fused configurations known
from benchmarks.common import RESULTS, replace_rows
from dssk.inference.rounding import DEFAULT_STORAGE, encoding_bytes
from dssk.models.shapes import projected_values
from dssk.run_folder import METRICS
from dssk.utils.json_files import read_json

SETS = ("xquad", "nq_swap")
SCORES = ("n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high")
BUFFERS = ("shift", "scale", "rows")  # of a reader, fitted and not trained
CACHE_BYTES = 2  # of a value of a KV cache in 16 bits


def trained(folder: Path) -> dict[str, Any]:
    """What a run, or a fine-tuned model of `dssk compare`, says of how it was trained."""
    if (folder / "settings.json").is_file():
        facts = read_json(folder / "settings.json", dict)
        return {
            "seed": facts["settings"]["seed"],
            "trained_parameters": facts["trained_parameters"],
            "train_cpu_seconds": facts["cpu_seconds"],
            "train_questions": facts["questions"],
        }
    lines = [json.loads(line) for line in (folder / METRICS).open()]
    experiment = read_json(folder / "exp_dict.json", dict)
    last = [line for line in lines if "cpu_seconds" in line][-1]
    checkpoint = folder / f"checkpoint-{last['step']}"
    config = AutoConfig.from_pretrained(checkpoint)
    weights = (checkpoint / "model.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    sizes = {name: prod(info["shape"]) for name, info in header.items() if name != "__metadata__"}
    return {
        "seed": experiment["seed"],
        "bytes_per_context_token": encoding_bytes(DEFAULT_STORAGE, config.states_width),
        "resident_bytes_per_context_token": CACHE_BYTES * projected_values(config),
        "trained_parameters": sum(
            size for name, size in sizes.items() if name.rpartition(".")[2] not in BUFFERS
        ),
        "train_cpu_seconds": last["cpu_seconds"],
        "train_questions": last["step"] * experiment["train_batch_size"] * experiment["skip_steps"],
    }


def rows_of(system: str, folder: Path | None, scores: Path) -> list[dict[str, Any]]:
    """A row for each set and control of a system."""
    facts = trained(folder) if folder else {}
    rows = []
    for name in SETS:
        for file in sorted([*scores.glob(f"{name}*.json"), *scores.glob(f"scores-{name}-*.json")]):
            found = read_json(file, dict)
            for control, scored in found.get("scores", found).items():
                if not isinstance(scored, dict) or "em" not in scored:
                    continue
                own = control == "with_context"
                row = {"system": system if own else f"{system}/{control}", "set": name}
                row |= {"seed": facts["seed"]} if facts else {}
                row |= {key: scored[key] for key in SCORES} | {"nll": scored["answer_nll"]}
                if own:
                    row |= facts | costs(scores, name, file.stem.removeprefix(f"scores-{name}-"))
                rows.append(row)
    return rows


def costs(folder: Path, name: str, system: str) -> dict[str, float]:
    """What the comparison in a folder measured of a system's answers, if it did."""
    table = read_json(folder / "table.json", list) if (folder / "table.json").is_file() else []
    rows = [row for row in table if (row["system"], row["data"]) == (system, name)]
    return {key: row[key] for row in rows for key in ("first_token_s", "tokens_per_s") if row.get(key)}


def main(words: list[str]) -> None:
    rows = []
    for word in words:
        system, _, places = word.partition("=")
        run, _, scores = places.partition(",")
        rows += rows_of(system, Path(run) if run else None, Path(scores))
    replace_rows(RESULTS / "real.json", rows, ("system", "set", "seed"))
    for row in rows:
        print(
            f"{row['system']:28} {row['set']:8} n {row['n']:5} EM {row['em']:.3f} F1 {row['f1']:.3f} NLL {row['nll']}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
