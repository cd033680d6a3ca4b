"""Several contexts a question, on the toy: `python benchmarks/bench_contexts.py [--seeds 0 1 2] [--steps 1200]`.

For each seed it makes the base, encodes, trains with one context and with several for equally many questions, and
scores both by the number of contexts. About ten minutes a seed on a quiet machine. Rows go to
benchmarks/results/contexts.json: {set, seed, num_contexts, gold, n, em, em_low, em_high, f1, right_beats_wrong,
first_token_s, tokens_per_s, bytes}; `set` is toy for the model trained on several, toy_one for the other. A row
{set, seed, training_seconds} says what training took, without evaluations.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dssk.evaluation import by_number

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "contexts.json"
GROUPS = {"toy": "crossattn_tiny_contexts", "toy_one": "crossattn_tiny"}


def dssk(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dssk", *map(str, words)], cwd=REPOSITORY, check=True)


def rows_of(seed: int, name: str, folder: Path, steps: int, numbers: str) -> list[dict[str, Any]]:
    """Train one of the groups and score it."""
    base, store, runs = folder / "base", folder / "processed_data" / "base", folder / f"runs-{name}"
    where = ["--set", f"model_path={base}", "--set", f"seed={seed}", "--data_path", store, "-sb", runs]
    how = ["--steps", steps, "--log_every", steps, "--generation_eval_samples", 0, "--save_fused", "final"]
    dssk("train", "-e", GROUPS[name], *where, *how)
    (run,) = (path for path in runs.iterdir() if (path / "metrics.jsonl").is_file())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    seconds = last["training_seconds"] + last["data_seconds"]
    dssk("evaluate", "--checkpoint", runs, "--data_path", store, "--num_contexts", numbers)
    scores = json.loads((run / "scores.json").read_text())
    taken = {"set": name, "seed": seed, "training_seconds": round(seconds, 1)}
    return [*by_number.rows(scores, name, seed), taken]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--num_contexts", default="1,2,5,10")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "contexts")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        folder = args.output.resolve() / f"seed-{seed}"
        dssk("base", "--dataset", "toy", "--seed", seed, "--output", folder / "base")
        made = ["--embedding_model", folder / "base", "--data_cache_path", folder]
        dssk(
            "preproc",
            "--dataset",
            "toy",
            "--seed",
            seed,
            *made,
            "--maximum_input_length",
            256,
            "--batch_size",
            64,
        )
        for name in GROUPS:
            rows += rows_of(seed, name, folder, args.steps, args.num_contexts)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
