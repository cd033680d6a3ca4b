"""Kill preprocessing with signal 9 at random moments, start the same command again, and compare every byte.

`kill.py` is the command. Each trial starts in an empty folder, is killed once, and must then end exactly as a run that
nobody killed: the same files with the same bytes, no temporary file, no shard encoded twice that was finished, no
worker left behind.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dssk import errors
from dssk.commands import preproc
from dssk.inference.loading import load_base
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import make_base
from tests.data.conftest import rows, stamps, tree, write_jsonl

SHARD_ROWS = 8


def is_running(process: Path) -> bool:
    """Whether a process (its folder in /proc) lives; one that nobody has waited for yet does not."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def num_files(folder: Path) -> int:
    """Files below a folder, whole or not; it may change meanwhile."""
    return sum(len(names) for _, _, names in os.walk(folder))


class Trials:
    """Runs of one command, in processes forked from this one so that nothing is imported again."""

    def __init__(self, folder: Path, num_contexts: int):
        self.folder = folder
        self.base = make_base(folder / "base")
        self.source = write_jsonl(folder / "rows.jsonl", rows(num_contexts))
        load_base(self.base), load_tokenizer(self.base)  # for what transformers imports late

    def path(self, name: str) -> Path:
        return self.folder / name / "processed_data" / self.base.name

    def start(self, name: str, num_proc: int) -> int:
        """Start the command on an output folder; returns the process's id."""
        command = f"--maximum_input_length 256 --batch_size 2 --shard_rows {SHARD_ROWS} --num_proc {num_proc}".split()
        paths = {"embedding_model": self.base, "data_cache_path": self.folder / name, "dataset": self.source}
        command += [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
        if pid := os.fork():
            return pid
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os._exit(errors.exit_code_of(lambda: preproc.main(command)))

    def finish(self, name: str, num_proc: int) -> None:
        """Run the command to its end."""
        _, status = os.waitpid(self.start(name, num_proc), 0)
        assert os.waitstatus_to_exitcode(status) == 0, f"{name}: the command failed after a kill"

    def kill_once(self, name: str, num_proc: int, after_files: int, seconds: float) -> bool:
        """Kill the command some time after it has written so many files; False if it had ended by then."""
        pid = self.start(name, num_proc)
        while num_files(self.path(name)) < after_files:
            time.sleep(0.001)
        time.sleep(seconds)
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return False
        workers = [
            Path(f"/proc/{child}") for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + 60  # one that is still importing finds out afterwards
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, f"{name}: a worker outlived its parent"
            time.sleep(0.01)
        return True

    def state(self, name: str) -> str:
        """What a command was at when it died."""
        path = self.path(name)
        if (path / "manifest.json").exists():
            return "cleaning up"
        if not (path / ".staging").exists():
            return "starting"
        if not (path / ".staging" / "plan.json").exists():
            return "reading"
        arrows = list((path / "contexts").glob("data-*.json"))
        return (
            "encoding"
            if len(arrows) < len(list(self.path("whole").glob("contexts/data-*.json")))
            else "finishing"
        )

    def finished_shards(self, name: str) -> dict[Path, tuple[int, int]]:
        """The stamps of the shards that must not be encoded again."""
        return stamps(p.with_suffix(".arrow") for p in (self.path(name) / "contexts").glob("data-*.json"))


def run(
    kills: int, num_procs: list[int], seed: int, num_contexts: int, say: Callable[[str], object]
) -> Counter:
    """`kills` trials, by turns with each number of processes; returns how many kills fell into each phase."""
    rng = random.Random(seed)
    phases: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), num_contexts)
        trials.finish("whole", 1)
        expected = tree(trials.path("whole"))
        while phases.total() < kills:
            num_proc = num_procs[phases.total() % len(num_procs)]
            name = str(phases.total())
            if trials.kill_once(name, num_proc, rng.randrange(len(expected)), rng.uniform(0, 0.05)):
                phase = trials.state(name)
                check(trials, name, num_proc, expected)
                phases[phase] += 1
                say(f"{phases.total()} of {kills}: {num_proc} processes, killed while {phase}: same bytes")
            shutil.rmtree(trials.folder / name, ignore_errors=True)
    return phases


def check(trials: Trials, name: str, num_proc: int, expected: dict[str, bytes]) -> None:
    """Go on after a kill and compare with a run that nobody killed."""
    finished = trials.finished_shards(name)
    temps = list(trials.path(name).glob("contexts/.tmp-*.arrow"))
    assert len(temps) <= num_proc, f"{name}: {len(temps)} unfinished shards for {num_proc} processes"
    trials.finish(name, num_proc)
    assert stamps(finished) == finished, f"{name}: a finished shard was encoded again"
    found = tree(trials.path(name))
    different = [file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)]
    assert not different, f"{name}: {different} differ"
