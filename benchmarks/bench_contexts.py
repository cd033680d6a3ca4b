"""Several contexts a question, on the toy or on a real base.

    python benchmarks/bench_contexts.py [--seeds 0 1 2] [--steps 5000]
    python benchmarks/bench_contexts.py --checkpoint C --questions HELD_OUT.jsonl --passages SQUAD.jsonl.gz

On the toy, for each seed it makes the base, encodes, trains with several contexts and with one for equally many
questions, and scores both by the number of contexts: about twenty minutes a seed. With a checkpoint
(or a run's folder, or a fused model) of a real base it encodes the contexts of both files and scores the questions of
the first one, each among other passages of its article, beside prompting the same base; the same command goes on
where it was stopped.

Rows go to benchmarks/results/contexts.json, in place of those of the same set, seed, system and number: {set, seed,
num_contexts, gold, n, em, em_low, em_high, f1, right_beats_wrong, first_token_s, tokens_per_s, bytes}. `set` is toy
for the model trained on several, toy_one for the other, squad for a real base. Rows of squad also say the `system` and
how many `contexts_left_out` of a prompt on average. A row {set, seed, training_seconds, cpu_seconds} says what training
took: by the clock without evaluations, and of the processor all in all.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import replace_rows
from dssk.evaluation import by_number
from dssk.inference.loading import find_encode_layer, find_model, load_config
from dssk.models.shapes import window

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "contexts.json"
GROUP = "crossattn_tiny_contexts"
CHANGES: dict[str, list[str]] = {
    "toy": [],
    "toy_one": ["--set", "num_contexts=1", "--set", "gold_missing=0"],
}
TOY_ROWS = 12_000  # twice the demo's: with fewer, training runs ahead of what is held out
# A base whose states keep the name of their text: no reader of those of `make demo` can tell whose a sentence is.
TOY_BASE = [
    "--hidden_size",
    160,
    "--heads",
    5,
    "--steps",
    400,
    "--memory_weight",
    0.3,
    "--subject_weight",
    0.3,
]


def dssk(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dssk", *map(str, words)], cwd=REPOSITORY, check=True)


def rows_of(seed: int, name: str, folder: Path, steps: int, numbers: str) -> list[dict[str, Any]]:
    """Train the group, with its changes, and score it."""
    base, store, runs = folder / "base", folder / "processed_data" / "base", folder / f"runs-{name}"
    where = ["--set", f"model_path={base}", "--set", f"seed={seed}", "--data_path", store, "-sb", runs]
    how = ["--steps", steps, "--log_every", steps, "--generation_eval_samples", 0, "--save_fused", "final"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    dssk("train", "-e", GROUP, *CHANGES[name], *where, *how)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (run,) = (path for path in runs.iterdir() if (path / "metrics.jsonl").is_file())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    seconds = last["training_seconds"] + last["data_seconds"]
    dssk("evaluate", "--checkpoint", runs, "--data_path", store, "--num_contexts", numbers)
    scores = json.loads((run / "scores.json").read_text())
    taken = {"set": name, "seed": seed, "training_seconds": round(seconds), "cpu_seconds": round(cpu_seconds)}
    return [*by_number.rows(scores, name, seed), taken]


def real_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Score a checkpoint, and the prompted base, by the number of passages of one article."""
    folder = args.output.resolve() / "squad"
    config: Any = load_config(find_model(args.checkpoint))
    base, revision = str(config.base_model_name_or_path), config.base_model_revision
    model = ["--embedding_model", base, "--encode_layer", find_encode_layer(args.checkpoint)]
    model += [
        "--maximum_input_length",
        min(4096, window(config)),
        *(["--revision", revision] if revision else []),
    ]
    # A passage of both files is one of the questions'.
    data = ["--dataset", args.passages, "--val_dataset", args.questions]
    dssk("preproc", *model, *data, "--data_cache_path", folder)
    systems = args.systems or f"{config.reader},prompted"
    how = ["--systems", systems, "--controls", "with_context", "--medium_cost", "false"]
    how += ["--max_questions", args.max_questions] if args.max_questions else []
    several = ["--num_contexts", args.num_contexts or "1,5,20,50", "--distractors", "document"]
    where = ["--data_path", folder / "processed_data" / Path(base).name, "--output", folder / "compare"]
    dssk("compare", "--checkpoint", args.checkpoint, *where, *how, *several)
    columns = ("system", "num_contexts", "gold", *by_number.COLUMNS, "contexts_left_out")
    return [
        {"set": "squad", "seed": args.seeds[0]} | {column: row[column] for column in columns if column in row}
        for row in json.loads((folder / "compare" / "table.json").read_text())
        if "num_contexts" in row
    ]


def replace(rows: list[dict[str, Any]]) -> None:
    """Put rows into the results, in place of those of their sets, seeds, systems and numbers of contexts."""
    replace_rows(RESULTS, rows, ("set", "seed", "system", "num_contexts"))


def path(text: str) -> Path:
    """A flag's path, wherever the commands run."""
    return Path(text).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="a checkpoint was trained with one"
    )
    parser.add_argument("--steps", type=int, default=5000, help="of the toy's training")
    parser.add_argument("--num_contexts", help="1,2,5,10 on the toy, 1,5,20,50 on a real base")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "contexts")
    real = parser.add_argument_group("a real base")
    real.add_argument("--checkpoint", type=path, help="checkpoint, run's folder or fused model")
    real.add_argument("--questions", type=path, help="file of the questions that are asked")
    real.add_argument("--passages", type=path, help="file with the other passages of their articles")
    real.add_argument("--systems", help="as dssk compare has them (its reader and prompted)")
    real.add_argument("--max_questions", type=int, help="ask this many, spread over the file (all)")
    args = parser.parse_args()
    if args.checkpoint:
        if not (args.questions and args.passages):
            parser.error("--checkpoint wants --questions and --passages")
        replace(real_rows(args))
        return
    folders = {seed: args.output.resolve() / f"seed-{seed}" for seed in args.seeds}
    for seed, folder in folders.items():
        dssk("base", "--dataset", "toy", *TOY_BASE, "--seed", seed, "--output", folder / "base")
        model = ["--embedding_model", folder / "base", "--maximum_input_length", 256, "--batch_size", 64]
        # A value that stands before its text's name is told from others by the title in front of both.
        rows = ["--dataset", "toy", "--max_examples", TOY_ROWS, "--repeat_title", "--seed", seed]
        dssk("preproc", *rows, *model, "--data_cache_path", folder)
    for name in CHANGES:
        for seed, folder in folders.items():
            replace(rows_of(seed, name, folder, args.steps, args.num_contexts or "1,2,5,10"))


if __name__ == "__main__":
    main()
