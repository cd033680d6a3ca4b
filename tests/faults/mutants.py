"""Small deliberate faults in the package, one at a time: `python -m tests.faults.mutants`.

Each is made in a copy of the repository, where the tests that should notice it must fail, and pass again without it.
`mutant_list.py` has them.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.mutant_list import MUTANTS, Mutant
from tests.faults.processes import Running, preload

REPOSITORY = Path(__file__).resolve().parent.parent.parent
COPIED = (
    "dssk",
    "tests",
    "benchmarks",
    "docs",
    "resources",
    "README.md",
    "Makefile",
    "CITATION.cff",
    "CHANGELOG.md",
)
COPIED += (
    "exp_configs.py",
    "job_configs.py",
    "trainval.py",
    "copy_wandb_key.sh",
    "pyproject.toml",
    ".gitignore",
)
COPIED += (".havenignore", "constraints.txt")
LIMIT_SECONDS = 900
# pytest's exit codes; the last is also that of a file that cannot be imported.
PASSED, NOTICED, INTERRUPTED = 0, 1, 2


def misfits(mutants: Sequence[Mutant] = MUTANTS, root: Path = REPOSITORY) -> list[str]:
    """Those whose pattern does not stand exactly once in its file, or whose tests are not there."""
    found = []
    for mutant in mutants:
        count = (root / mutant.file).read_text().count(mutant.before)
        if count != 1:
            found.append(f"{mutant.file}: {mutant.before!r} stands there {count} times")
        found += [
            f"{mutant.file}: no tests/{name}"
            for name in paths(mutant)
            if not (root / "tests" / name).exists()
        ]
    return found


def paths(mutant: Mutant) -> list[str]:
    """The files or folders of tests that a mutant names."""
    words = shlex.split(mutant.tests)
    return words[: words.index("-k")] if "-k" in words else words


def copy(folder: Path) -> Path:
    """The part of the repository that tests of the package need."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


class Failed:
    """A plugin of pytest that writes down what failed."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)


def run_tests(words: list[str], failed: Path) -> None:
    """pytest on the copy that is the working directory, with nothing of the original imported."""
    import pytest

    here = os.getcwd()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dssk", "tests", "exp_configs")]:
        del sys.modules[name]
    sys.path[:] = [here, *(path for path in sys.path if path and Path(path).resolve() != REPOSITORY)]
    os.environ["PYTHONPATH"] = here
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words], [Failed(failed)]))


def pytest_on(folder: Path, words: list[str]) -> tuple[int | None, str]:
    """pytest's exit code, and the test that failed."""
    failed = folder.with_name(f"{folder.name}.failed")
    failed.unlink(missing_ok=True)
    code = Running(run_tests, folder, "", words, failed).done(LIMIT_SECONDS).code
    return code, failed.read_text() if failed.exists() else ""


def try_one(mutant: Mutant, folder: Path) -> str:
    """How a copy with this one fault is not noticed, or nothing; the copy is as it was afterwards."""
    file = folder / mutant.file
    whole = file.read_text()
    file.write_text(whole.replace(mutant.before, mutant.after))
    words = shlex.split(mutant.tests)
    tests = [f"tests/{name}" for name in paths(mutant)]
    words = [*tests, *words[len(tests) :]]
    try:
        code, failed = pytest_on(folder, words)
    finally:
        file.write_text(whole)
    if code == PASSED:
        return "not noticed"
    if code not in (NOTICED, INTERRUPTED):
        return f"pytest ended with {code}"
    again = [failed] if failed else words
    if pytest_on(folder, again)[0] != PASSED:
        return f"{' '.join(again)}: fails without it, too"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=len(MUTANTS), help="of them, chosen by the seed (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--file", default="", help="only of files whose name has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time (as many as cores)")
    args = parser.parse_args()
    if wrong := misfits():
        sys.exit("\n".join(wrong))
    known = [mutant for mutant in MUTANTS if args.file in mutant.file]
    chosen = Random(args.seed).sample(known, len(known))[args.first :][: args.count]
    sys.exit(run_mutants(chosen, args.jobs))


def run_mutants(mutants: Sequence[Mutant], jobs: int = 1) -> int:
    """All of these; returns the exit code, 1 if one was not noticed."""
    preload("tests.faults.libraries")
    start, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="dssk-mutants-") as temp:
        folders = [copy(Path(temp) / str(number)) for number in range(jobs)]

        def one(mutant: Mutant) -> None:
            folder = folders.pop()
            how = try_one(mutant, folder)
            folders.append(folder)
            if how:
                missed.append(mutant)
                print(
                    f"{mutant.file}: {mutant.before!r} -> {mutant.after!r}: {how} by {mutant.tests}",
                    flush=True,
                )

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, mutants))
    noticed = len(mutants) - len(missed)
    print(f"{noticed} of {len(mutants)} noticed, {time.monotonic() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    main()
