"""Two of each command at once in one folder: `python -m tests.faults.race --count 20 --seed 0`.

`--count` pairs of each command; the second starts at any moment of the first one, every third just before its end. One
of them goes on and ends right; the other does so after it, or says in one line who holds the folder (exit code 6).
"""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import world
from tests.faults.campaign import Campaign, Case, broken_rule, main_of_commands
from tests.faults.kill import convert, look, make_wheel
from tests.faults.processes import Done, Running, run

LOCKED = 6
MINUTES = 60


class Pair(NamedTuple):
    """Two commands on one folder."""

    first: Any
    second: Any
    beside: Sequence[str]
    results: Sequence[Any]
    may_say: tuple[str, ...] = ()
    """What the later one may say instead, for what the earlier one has done."""
    args: Sequence[Any] = ()


def pairs(here: world.World) -> dict[str, Pair]:
    run_dir = f"{world.SAVEDIR_BASE}/{here.run}"
    beside = ["base", run_dir, world.STORE, "exps.py"]

    def twice(argv: Any, *rest: Any, args: Sequence[Any] = ()) -> Pair:
        beside, results, *may_say = rest
        return Pair(argv, argv, beside, results, tuple(may_say), args)

    more = [*world.TRAIN, "--steps", "4", "--save_fused", "never"]
    add_two, listed = ["library", "library", "add", "two.txt"], [("library", "library", "list")]
    return {
        "preproc": twice([*world.PREPROC, "--data_cache_path", "new"], ["base", "rows.jsonl"],
                         ["new/processed_data/base/manifest.json", ("verify", "new/processed_data/base")]),
        "train": twice(more, beside, [f"{run_dir}/checkpoint-4/model.safetensors"]),
        "evaluate": twice(world.EVALUATE_ROWS, ["base", "fused", "rows.jsonl"], ["s/scores.json"]),
        "library add": twice(add_two, ["base", "library", "two.txt"], listed, "has a context"),
        "library add and remove": Pair([*add_two[:2], "remove", "m4"], [*add_two[:2], "remove", "m5"],
                                       ["base", "library"], [("library", "library", "verify")]),
        "report": twice(["report", run_dir, "--samples", "1"], ["base", run_dir], [f"{run_dir}/report*"]),
        "export": twice(["export", "--checkpoint", run_dir, "--output", "new"], ["base", run_dir],
                        ["new/model.safetensors", "new/*"]),
        "publish": twice(["publish", "--checkpoint", run_dir, "--output", "new"], ["base", run_dir],
                         ["new/model.safetensors", "new/*"], "exists: want a new folder"),
        "base": twice(convert, ["wheel"], ["new/model.safetensors", "new/*"], args=["new"]),
    }  # fmt: skip


class Races:
    """Pairs of one kind."""

    def __init__(self, campaign: Campaign, name: str, pair: Pair, rng: random.Random):
        self.campaign, self.name, self.pair, self.rng = campaign, name, pair, rng
        here = self.fresh("whole")
        start = time.monotonic()
        world.expect(run(pair.first, here, *pair.args))
        self.seconds = time.monotonic() - start
        self.expected = look(pair.results, here)
        self.codes: list[tuple[int | None, int | None]] = []

    def fresh(self, name: str) -> Path:
        place = self.campaign.folder / "race" / self.name.replace(" ", "-") / name
        self.campaign.world.copy(place / "here", self.pair.beside)
        (place / "beside").symlink_to("here")  # what the second says goes to files of its own
        return place / "here"

    def one(self, number: int) -> str | None:
        """One pair; what is wrong with it."""
        here = self.fresh(str(number))
        first = Running(self.pair.first, here, "", *self.pair.args)
        near_the_end = number % 3 == 2
        time.sleep(
            self.seconds * self.rng.uniform(0.85, 1.05) if near_the_end else self.rng.uniform(0, self.seconds)
        )
        second = Running(self.pair.second, here.with_name("beside"), "", *self.pair.args)
        both = first.done(), second.done()
        self.codes.append((both[0].code, both[1].code))
        wrong = self.check(both, here)
        if wrong is None:
            shutil.rmtree(here.parent)
            return None
        said = "\n".join(f"{done.code}: {done.err[-1200:]}" for done in both)
        return f"{self.name} in {here}: {wrong}\n{said}"

    def check(self, both: tuple[Done, Done], here: Path) -> str | None:
        if all(done.code != 0 for done in both):
            return "neither went on"
        for done in both:
            if fault := broken_rule(done, Case(done.argv, [])):
                return fault
            if done.code == LOCKED and '"pid"' not in done.err:
                return "does not say who holds it"
            if done.code not in (0, LOCKED) and not any(text in done.err for text in self.pair.may_say):
                return f"ends with {done.code}"
        if (found := look(self.pair.results, here)) != self.expected and self.pair.first == self.pair.second:
            return f"ends with {found}, not {self.expected}"
        return None


def race_all(
    count: int,
    seed: int,
    names: Sequence[str] = (),
    minutes: float = MINUTES,
    campaign: Campaign | None = None,
) -> int:
    """`count` pairs of each kind; returns the exit code."""
    start, wrong, races = time.monotonic(), [], 0
    mine = campaign or Campaign(Path(tempfile.mkdtemp(prefix="dssk-faults-")), seed)
    for name, pair in pairs(mine.world).items():
        if names and name not in names:
            continue
        if pair.first is convert:
            make_wheel(mine)
        kind = Races(mine, name, pair, random.Random(f"{seed}/{name}"))
        for number in range(count):
            if time.monotonic() - start > 60 * minutes:
                break
            races += 1
            if fault := kind.one(number):
                wrong.append(fault)
                print(fault, flush=True)
        refused = sum(LOCKED in codes for codes in kind.codes)
        print(f"{name}: {len(kind.codes)} pairs, one refused in {refused}", flush=True)
    print(f"{races} pairs, {len(wrong)} violations, seed {seed}, {time.monotonic() - start:.0f} s")
    if not wrong and not campaign:
        shutil.rmtree(mine.folder)
    return 1 if wrong else 0


def main() -> None:
    main_of_commands(__doc__ or "", race_all, 20, MINUTES)


if __name__ == "__main__":
    main()
