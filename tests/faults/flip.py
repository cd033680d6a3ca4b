"""One bit flipped, or an end cut off, in what commands have written: `python -m tests.faults.flip --count 1000`.

The first command that reads the file must say so in one line, or give what it gives without any damage.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import campaign, world
from tests.faults.campaign import Campaign, Case
from tests.faults.mutations import flip

NEW = "new/model.safetensors"
SCORES = ["s/scores.json", "s/predictions.jsonl"]


class Target(NamedTuple):
    """A folder to damage, what must lie beside it, and what reads it: command, what that writes, its results."""

    damaged: str
    beside: list[str]
    readers: list[tuple[list[str], list[str], list[Any]]]


def targets(run: str) -> dict[str, Target]:
    """What can be damaged, by name."""
    checkpoint, text = f"{run}/checkpoint-2", ["--context", "one.txt", *world.QUESTION]
    evaluate = ["evaluate", "--data_path", world.STORE, *world.SHORT, "--controls", "with_context,no_context"]
    evaluate += ["--output", "s/scores.json", "--checkpoint"]
    more_training = [*world.TRAIN, "--steps", "3", "--save_fused", "never"], ["runs", "__pycache__"]
    trained = [f"{run}/checkpoint-3/model.safetensors", f"{run}/checkpoint-3/optimizer.safetensors"]
    listed = [("library", "library", "list"), ("library", "library", "search", "dam mill 3")]
    of_checkpoint: list[tuple[list[str], list[str], list[Any]]] = [
        (["answer", "--checkpoint", checkpoint, *text], [], []),
        ([*evaluate, checkpoint], ["s"], SCORES),
        (["export", "--checkpoint", checkpoint, "--output", "new"], ["new"], [NEW]),
        (["publish", "--checkpoint", checkpoint, "--output", "new"], ["new"], [NEW]),
        (*more_training, trained),
    ]
    return {
        "base": Target("base", [run, world.STORE, "one.txt", "two.txt", "exps.py", "library"], [
            *of_checkpoint,
            (["library", "library", "add", "two.txt"], ["library"], listed),
        ]),
        "store": Target(world.STORE, ["base", "fused", "exps.py"], [
            (["verify", world.STORE], [], []),
            ([*evaluate, "fused"], ["s"], SCORES),
            (["answer", "--checkpoint", "fused", "--library", world.STORE, *world.QUESTION], [], []),
            (["library", world.STORE, "list"], [], []),
            ([*world.TRAIN, "--steps", "1", "--save_fused", "never"], ["runs", "__pycache__"],
             [f"{run}/checkpoint-1/model.safetensors"]),
        ]),
        "unfinished store": Target(world.UNFINISHED_STORE, ["base", "rows.jsonl"], [
            (world.PREPROC_AGAIN, ["unfinished"], [("verify", world.UNFINISHED_STORE), *(
                f"{world.UNFINISHED_STORE}/{name}" for name in ("manifest.json", "dataset_dict.json"))]),
        ]),
        "library": Target("library", ["base", "fused", "two.txt"], [
            (["library", "library", "verify"], [], []),
            (["library", "library", "list"], [], []),
            (["library", "library", "search", "mill 3"], [], []),
            (world.LIBRARY_ANSWER, [], []),
            (["library", "library", "add", "two.txt"], ["library"], listed),
            (["library", "library", "remove", "m4"], ["library"], listed),
        ]),
        "checkpoint": Target(checkpoint, ["base", f"{run}/checkpoint-1", f"{run}/exp_dict.json", world.STORE,
                                          "one.txt", "exps.py"], of_checkpoint),
        "fused": Target("fused", ["base", world.STORE, "one.txt", "two.txt"], [
            (["answer", "--checkpoint", "fused", *text], [], []),
            ([*evaluate, "fused"], ["s"], SCORES),
            (["publish", "--checkpoint", "fused", "--output", "new"], ["new"], [NEW]),
            (["library", "new", "add", "--checkpoint", "fused", "two.txt"], ["new"], [("library", "new", "list")]),
        ]),
        "partial predictions": Target("s", ["base", "fused", "rows.jsonl"], [(world.EVALUATE_ROWS, ["s"], SCORES)]),
    }  # fmt: skip


def make_case(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """One damaged file and one command that reads it."""
    known = targets(f"runs/{campaign.world.run}")
    kind = campaign.only or rng.choice(list(known))
    target = known[kind]
    campaign.copy(here, [target.damaged, *target.beside])
    file = rng.choice(
        [f for f in sorted((here / target.damaged).rglob("*")) if f.is_file() and f.stat().st_size]
    )
    file.write_bytes(flip(rng, file.read_bytes()))
    argv, writes, seen = rng.choice(target.readers)
    return Case(
        argv, writes, seen=seen, must_fail="verify" in argv, kind=kind, about=str(file.relative_to(here))
    )


def main() -> None:
    campaign.main(__doc__ or "", make_case, "flips and cuts", list(targets("")))


if __name__ == "__main__":
    main()
