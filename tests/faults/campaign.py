"""Many cases, each a command on a copy of the world that something was done to, and the rules that all must keep."""

import argparse
import collections
import getpass
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tests.faults import world
from tests.faults.processes import LIMIT_SECONDS, Done, run

MAX_LINE = 1000
OF_LIBRARIES = {
    ".config",
    f"torchinductor_{getpass.getuser()}",
}  # that matplotlib and torch leave in every home
AT_EXIT = ("wandb-media", "wandb-artifacts")  # wandb removes them at exit, which forked processes leave out
SPEAKS_OF_WORK = ("train", "preproc")  # what these print depends on how much there was to do, and how fast
SIZE = re.compile(r"[\d.]+ ([kMG]?B)\b")  # of a whole folder, in which notes may differ
Snapshot = dict[str, tuple]


class Case(NamedTuple):
    """A command, and what is known of its end."""

    argv: Sequence[str]
    writes: Sequence[str]
    """What it may write, relative to its working directory."""
    check: Callable[[Done], str | None] = lambda done: None
    """What is wrong with its results if it exits with 0."""
    seen: Sequence[Any] | None = None
    """Files, or further commands whose output, must be as without any change if it exits with 0, as its own output."""
    must_fail: bool = False
    new_is_ok: bool = False
    env: dict[str, str] = {}  # noqa: RUF012 - never changed
    kind: str = ""
    about: str = ""


class Campaign:
    """Cases on one world."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        only: str | None = None,
        keep: bool = False,
        env: dict[str, str] | None = None,
    ):
        self.folder, self.seed, self.only, self.keep = folder, seed, only, keep
        for name, place in (("TMPDIR", "tmp"), ("HOME", "home")):
            (folder / place).mkdir()
            os.environ[name] = str(folder / place)
        os.environ |= {"HF_HUB_OFFLINE": "1", **(env or {})}  # before the process that others are forked from
        self.world = world.build(folder)
        self._expected: dict[str, Any] = {}
        self._lock = threading.Lock()

    def copy(self, here: Path, names: Sequence[str]) -> None:
        """Some of the world, as the working directory `here`."""
        self.world.copy(here, names)

    def one(
        self, number: int, make_case: Callable[["Campaign", random.Random, Path], Case]
    ) -> tuple[Case, str | None]:
        """Case `number`, and how it breaks the rules."""
        place = self.folder / f"case-{number}"
        here = place / "here"
        case = make_case(self, random.Random(f"{self.seed}/{number}"), here)
        neighbour(place / "neighbour")
        before = snapshot(place)
        done = run(case.argv, here, **case.env)
        wrong = broken_rule(done, case) or changed_outside(before, snapshot(place), case)
        if not wrong and done.code == 0:
            wrong = case.check(done)
            fell_back = "\nskipped " in done.out  # training, on an older checkpoint, and has said so
            if not wrong and case.seen is not None and not fell_back:
                seen, expected = self.look(case, done, here), self.expected(case)
                wrong = None if seen == expected else f"exit code 0 with {seen} in place of {expected}"[:2000]
        if not (self.keep or wrong):
            shutil.rmtree(place)
        if wrong:
            said = f"exit code {done.code}: {done.err[-1500:]}"
            wrong = f"case {number} ({case.kind} {case.about}) in {here}:\n  {' '.join(case.argv)}\n  {wrong}\n  {said}"
        return case, wrong

    def look(self, case: Case, done: Done, here: Path) -> list[Any]:
        """What a case left to be compared."""
        said = SIZE.sub(r"SIZE \1", done.out.replace(str(here), "HERE"))
        seen: list[Any] = [] if case.argv[0] in SPEAKS_OF_WORK else [said]
        for what in case.seen or ():
            if not isinstance(what, str):
                seen += run(what, here)[1:4]
            elif (here / what).is_file():
                content = (here / what).read_bytes()
                seen.append(xxhash.xxh3_128_hexdigest(content) if len(content) > 1000 else content)
            else:
                seen.append(f"no {what}")
        return seen

    def expected(self, case: Case) -> list[Any]:
        """The same of a world that nothing was done to."""
        key = json.dumps([list(case.argv), list(case.seen or ())])
        with self._lock:
            if key not in self._expected:
                here = Path(tempfile.mkdtemp(dir=self.folder, prefix="whole-")) / "here"
                self.world.copy(here, [path.name for path in self.world.folder.iterdir()])
                done = world.expect(run(case.argv, here, **case.env))
                self._expected[key] = self.look(case, done, here)
                shutil.rmtree(here.parent)
            return self._expected[key]


def neighbour(folder: Path) -> None:
    """What must stay as it is, with the names of what commands of ours would clean away."""
    for name in ("contexts/data-00000-of-00001.arrow", "contexts/.tmp-01234567-x.arrow", "notes.txt", "checkpoint-1/a",
                 "search-0123456789abcdef/x", "manifest.json", "scores.json", "model.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def snapshot(folder: Path) -> Snapshot:
    """Every file and folder, with what changes when it is written to."""
    found: Snapshot = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, folder)] = (
                (stat.st_mode, stat.st_size, stat.st_mtime_ns) if name in files else ()
            )
    return found


def changed_outside(before: Snapshot, after: Snapshot, case: Case) -> str | None:
    """What a command changed beside what it was given."""
    own = {"here.out", "here.err"}
    allowed = [os.path.normpath(os.path.join("here", name)) for name in case.writes]
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path) or path in own:
            continue
        if any(path == name or path.startswith(f"{name}/") for name in allowed):
            continue
        if path not in before and case.new_is_ok:
            continue
        return f"{path} was {'removed' if path not in after else 'changed' if path in before else 'made'}"
    return None


def broken_rule(done: Done, case: Case) -> str | None:
    """How the end of a command is not as it must be."""
    if done.code is None:
        return f"ran over {LIMIT_SECONDS} s"
    if "Traceback" in done.err:
        return "a traceback"
    if done.code == 0:
        return "exit code 0 for what cannot be right" if case.must_fail else None
    if not 2 <= done.code <= 6:
        return "neither 0 nor 2 to 6"
    lines = done.err.splitlines()
    errors = [line for line in lines if line.startswith("dssk: error: ")]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} lines of error"
    if strange := [line for line in lines if not line.startswith("dssk: ")]:
        return f"says more: {strange[0][:200]!r}"
    if len(errors[0]) > MAX_LINE or not errors[0].isprintable():
        return "its line is too long or not printable"
    return None


def main(
    doc: str, make_case: Callable[[Campaign, random.Random, Path], Case], what: str, kinds: Sequence[str]
) -> None:
    """The command line of a campaign; the last line is its figure."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--kind", choices=kinds, help="only of this kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (as many as cores)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no further one after these"
    )
    args = parser.parse_args()
    sys.exit(run_campaign(make_case, what, **vars(args)))


def main_of_commands(doc: str, run_all: Callable[..., int], count: int, minutes: float) -> None:
    """The command line of what tries each command of a list so many times; `count` and `minutes` are defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help="for each command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", nargs="+", default=[], metavar="COMMAND", help="only these")
    parser.add_argument("--minutes", type=float, default=minutes, help="begin no further one after these")
    args = parser.parse_args()
    sys.exit(run_all(args.count, args.seed, args.of, args.minutes))


def run_campaign(
    make_case: Callable[[Campaign, random.Random, Path], Case],
    what: str,
    count: int,
    seed: int = 0,
    first: int = 0,
    kind: str | None = None,
    jobs: int | None = 1,
    minutes: float = float("inf"),
    campaign: Campaign | None = None,
) -> int:
    """All cases; returns the exit code, 1 if one broke a rule. Those that did are kept."""
    start = time.monotonic()
    mine = campaign or Campaign(Path(tempfile.mkdtemp(prefix="dssk-faults-")), seed, kind, keep=count == 1)
    kinds: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []

    def one(number: int) -> None:
        if time.monotonic() - start > 60 * minutes:
            return
        case, fault = mine.one(number, make_case)
        kinds[case.kind] += 1
        if fault:
            wrong.append(fault)
            print(fault, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, range(first, first + count)))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    for place in ("tmp", "home"):
        names = [path.name for path in (mine.folder / place).iterdir()]
        left = sorted(name for name in names if name not in OF_LIBRARIES and not name.endswith(AT_EXIT))
        if left:
            wrong.append(f"left in {place}: {left}")
            print(wrong[-1])
    print("  ".join(f"{name} {number}" for name, number in sorted(kinds.items())))
    print(
        f"{kinds.total()} {what}, {len(wrong)} violations, seed {mine.seed}, {time.monotonic() - start:.0f} s"
    )
    if not wrong and count > 1 and not campaign:
        shutil.rmtree(mine.folder)
    return 1 if wrong else 0
