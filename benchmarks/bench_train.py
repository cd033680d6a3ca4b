"""What training costs besides training: `python benchmarks/bench_train.py`.

Whole runs of trainval's own function, each in a fresh process: data waiting and saving as shares of the time, the
bytes of a checkpoint, tokens a second and peak memory. Everything is measured in the same run; a row without a
reference stands beside itself.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Results, random_base
from dssk.checkpoint import latest_checkpoint
from dssk.commands import preproc
from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.training.flags import DEFAULT_LOG_EVERY
from dssk.training.run import train
from exp_configs import BASE_CONFIG
from tests.conftest import byte_tokenizer

ROWS, CONTEXT_CHARACTERS = 128, 512
LAYOUT = {"num_cross_attn_layers": 3, "cross_attn_shared_weights": False, "cross_attn_layers_stride": 3}
RUNS = {
    "SMALL": {"steps": 100, "log_every": 100, "layout": LAYOUT | {"cross_attn_layers_stride": 2}},
    "MEDIUM": {"steps": 4, "log_every": 4, "layout": LAYOUT},
}


def make_store(size: str, folder: Path) -> tuple[Path, Path]:
    """A random base and contexts of about 512 tokens, encoded by it."""
    base = random_base(size, folder)
    byte_tokenizer().save_pretrained(base)
    rng = random.Random(0)
    source = folder / f"{size}.jsonl"
    with source.open("w") as file:
        for number in range(ROWS):
            text = "".join(rng.choices("abcdefgh ", k=CONTEXT_CHARACTERS))
            question = "".join(rng.choices("abcdefgh ", k=48))
            file.write(
                json.dumps({"id": str(number), "context": text, "question": question, "answer": text[:8]})
                + "\n"
            )
    argv = ["--dataset", str(source), "--embedding_model", str(base), "--data_cache_path", str(folder)]
    preproc.main([*argv, "--maximum_input_length", "1024", "--val_fraction", "0.1"])
    return base, folder / "processed_data" / size


def measure(size: str, folder: Path) -> dict:
    """Train once in this process."""
    settings = RUNS[size]
    exp_dict = {
        **BASE_CONFIG,
        **settings["layout"],
        "model_path": str(folder / size),
        "context_size": 1024,
        "train_batch_size": 4,
        "test_batch_size": 4,
        "include_context_ids": False,
        "loss_on": "answer",
        "fp16": False,
        "gradient_checkpointing": False,
    }
    argv = [
        "-e",
        "bench",
        "-sb",
        str(folder),
        "--data_path",
        str(folder / "processed_data" / size),
        "-r",
        "1",
    ]
    argv += ["--steps", str(settings["steps"]), "--log_every", str(settings["log_every"])]
    train(
        parse_args([*argv, "--save_fused", "never", "--generation_eval_samples", "0"]), {"bench": [exp_dict]}
    )
    savedir = folder / experiment_id(exp_dict)
    lines = [json.loads(line) for line in (savedir / "metrics.jsonl").read_text().splitlines()]
    (end,) = (line for line in lines if "train_runtime" in line)
    checkpoint = latest_checkpoint(savedir)
    assert checkpoint is not None
    return {
        **{name: end[f"{name}_seconds"] for name in ("training", "data", "saving")},
        "steps": settings["steps"],
        "saves": settings["steps"] // settings["log_every"],
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "original_checkpoint_bytes": original_checkpoint_bytes(folder / size, checkpoint),
        "tokens_per_second": next(line["tokens_per_second"] for line in lines if "tokens_per_second" in line),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def original_checkpoint_bytes(base: Path, checkpoint: Path) -> int:
    """What the published original would have written: all weights, and AdamW's two moments of the blocks, in fp32."""
    with safe_open(checkpoint / "model.safetensors", "pt") as blocks:
        trained = sum(math.prod(blocks.get_slice(name).get_shape()) for name in blocks.keys())  # noqa: SIM118
    return (base / "model.safetensors").stat().st_size + (4 + 2 * 4) * trained


def in_fresh_process(size: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--size", size, "--folder", str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if args.size:
        print(json.dumps(measure(args.size, args.folder)))
        return

    start = time.perf_counter()
    results = Results("train")
    with tempfile.TemporaryDirectory() as name:
        for size in RUNS:
            make_store(size, Path(name))
            add_rows(results, size, in_fresh_process(size, Path(name)))
    results.write()
    print(f"{time.perf_counter() - start:.0f} s in all")


def add_rows(results: Results, size: str, run: dict) -> None:
    step = (run["training"] + run["data"]) / run["steps"]
    settings = {"steps": run["steps"], "rows": 4, "context_tokens": CONTEXT_CHARACTERS, "threads": 1}
    save = run["saving"] / run["saves"]
    stall = save / (DEFAULT_LOG_EVERY * step)
    if size == "SMALL":
        wait = run["data"] / (run["training"] + run["data"])
        results.add("data_wait_share", wait, wait, 1.0, "share of a step", size=size, **settings)
    else:
        own, original = run["checkpoint_bytes"], run["original_checkpoint_bytes"]
        results.add("checkpoint_bytes_medium", own, original, original / own, "bytes")
    allowed = 0.02
    details = {"size": size, "save_seconds": round(save, 4), "interval_steps": DEFAULT_LOG_EVERY}
    results.add(
        f"save_stall_share_{size}", stall, allowed, allowed / stall, "share of training; limit", **details
    )
    own = run["tokens_per_second"]
    results.add(f"tokens_per_second_{size}", own, own, 1.0, "decoder tokens, padding included", **settings)
    results.add(
        f"peak_memory_{size}", run["peak_mb"], run["peak_mb"], 1.0, "MB of the whole process", **settings
    )


if __name__ == "__main__":
    main()
