"""transformers' own common model tests on fused classes, with the plain class as baseline: `make test-transformers`.

Its source distribution is fetched through pip, outside the repository; the tests run twice, on the plain classes of
a few families and on ours. What fails on ours and not on the plain class fails the run, unless it is one of
`EXCEPTIONS`; an exception that no longer fails does so, too.

The distribution holds the common model tests and not those of generation and export, which are in the repository
alone: name a checkout of that version in TRANSFORMERS_SOURCE, and they run as well.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = "tests/suites/cases.py"
PACKAGE = "transformers_suite"
STAND_INS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}

# A test's name (a regular expression for the whole of it) -> why it may fail on a fused class and not on a plain one.
EXCEPTIONS = {
    r"Fused_\w+::test_training(_gradient_checkpointing\w*)?": "without a context nothing trains: the base is frozen",
    r"\w+::test_retain_grad_hidden_states_attentions": "no gradient reaches the states of a frozen base",
    r"\w+::test_model_weights_reload_no_missing_tied_weights": "a file without the blocks' weights is refused",
}


def main() -> int:
    folder = suite_folder()
    with tempfile.TemporaryDirectory() as temp:
        report = Path(temp) / "report.xml"
        options = ["-q", "--noconftest", "-o", "addopts=", "-n", "2", "--no-header", "--tb=line"]
        command = [sys.executable, "-m", "pytest", CASES, *options, f"--junitxml={report}", *sys.argv[1:]]
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=REPOSITORY, env=environment)
        return judge(outcomes(report), complete=not sys.argv[1:])


def suite_folder() -> Path:
    """The folder that holds transformers' tests as the package `PACKAGE`."""
    installed = version("transformers")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dssk"
    source = os.environ.get("TRANSFORMERS_SOURCE")
    folder = cache / f"transformers-{installed}-{'checkout' if source else 'sdist'}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temp:
            package = Path(temp) / "made" / PACKAGE
            shutil.copytree(Path(source or fetch(Path(temp), installed)) / "tests", package)
            for name, text in STAND_INS.items():
                if not (package / name).exists():
                    (package / name).parent.mkdir(exist_ok=True)
                    (package / name).write_text(text)
            (Path(temp) / "made").rename(folder)
    return folder


def fetch(folder: Path, installed: str) -> Path:
    """The unpacked source distribution of transformers."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest",
               str(folder), f"transformers=={installed}"]  # fmt: skip
    if subprocess.run(command).returncode:
        sys.exit(f"pip cannot fetch the source of transformers {installed}: this needs a package index")
    with tarfile.open(folder / f"transformers-{installed}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{installed}"


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Of each class of cases, its tests: "passed", "skipped", or the first line of what failed."""
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failed = [node for tag in ("failure", "error") if (node := case.find(tag)) is not None]
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        if failed:
            outcome = (failed[0].get("message") or "failed").splitlines()[0][:160]
        found.setdefault(case.get("classname", "").rpartition(".")[2], {})[case.get("name", "")] = outcome
    return found


def judge(found: dict[str, dict[str, str]], complete: bool) -> int:
    """Print what is new among the failures of the fused classes; the exit code. `complete`: all tests were run."""
    faults, used = [], set()
    for name, tests in sorted(found.items()):
        plain = found.get(f"Plain{re.sub('^(Plain|Fused|Reading)', '', name)}", {})
        failed = {test: why for test, why in tests.items() if why not in ("passed", "skipped")}
        new = {test: why for test, why in failed.items() if plain.get(test) in ("passed", "skipped", None)}
        for test, why in new.items():
            reasons = [pattern for pattern in EXCEPTIONS if re.fullmatch(pattern, f"{name}::{test}")]
            used.update(reasons)
            if not reasons:
                faults.append(f"{name}::{test}: {why}")
        counts = Counter(why if why in ("passed", "skipped") else "failed" for why in tests.values())
        print(f"{name:28} {dict(counts)}, {len(new)} that the plain class lacks")
    for fault in faults:
        print(f"FAILED {fault}")
    stale = [pattern for pattern in EXCEPTIONS if complete and pattern not in used]
    for pattern in stale:
        print(f"NO LONGER FAILS, take it off the list: {pattern}")
    ran = {name for name in found if not name.startswith("Plain")}
    print(
        f"{len(faults)} failures without a reason, {len(EXCEPTIONS)} named exceptions, {len(ran)} fused classes"
    )
    return bool(faults or stale or not ran)


if __name__ == "__main__":
    sys.exit(main())
