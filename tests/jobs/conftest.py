"""A user's checkout with a group of three experiments, and a cluster to launch them on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, experiment

ACCOUNT = "6a1b"
TOOLKIT_JOB = {
    "image": "registry.example.org/image",
    "data": ["team.{user}.home:/mnt/home"],
    "resources": {"gpu": 0, "cpu": 1},
    "num_processes": 2,
}
TREE = ("dssk", "trainval.py", "copy_wandb_key.sh", ".havenignore", ".gitignore")


@dataclass
class Checkout:
    """A copy of the repository in `root`, with its own experiments and job configuration."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def configure(self, experiments: list[dict], jobs: dict) -> None:
        (self.root / "exp_configs.py").write_text(f"EXP_GROUPS = {{'crossattn_test': {experiments!r}}}\n")
        (self.root / "job_configs.py").write_text(
            f"EAI_ACCOUNT_ID_TO_USER = {{{ACCOUNT!r}: 'ann'}}\nJOB_CONFIG = {{'default': {jobs!r}}}\n"
        )

    def bash(self, script: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Run a script as a user would, in the checkout."""
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=self.root,
            env=os.environ | self.environment | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    root = tmp_path / "check out"  # users' paths have spaces
    root.mkdir()
    for name in TREE:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, root / name)
    commands = tmp_path / "commands"
    executable(commands / "python", f'exec {sys.executable} "$@"')
    executable(commands / "activate", '[ -d "$1" ] && export ACTIVATED=$1')
    executable(commands / "eai", "echo Bearer of-the-test")
    executable(
        tmp_path / "p2/bin/torchrun",
        f'[ "$ACTIVATED" ] && exec {sys.executable} -m torch.distributed.run "$@"',
    )
    home = tmp_path / "home"
    home.mkdir()
    return Checkout(
        root,
        {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "OMP_NUM_THREADS": "1",
            "WANDB_API_KEY": "",
            "EAI_ACCOUNT_ID": ACCOUNT,
        },
    )


@pytest.fixture
def toolkit(checkout, tmp_path):
    """The checkout on a machine of the (fake) toolkit; whatever still runs at the end is stopped."""
    pytest.importorskip("haven", reason='haven-ai is not installed: pip install "dssk[haven]"')
    jobs = tmp_path / "toolkit jobs"
    jobs.mkdir()
    checkout.environment |= {
        "FAKE_TOOLKIT": str(jobs),
        "PYTHONPATH": str(REPOSITORY / "tests/jobs/fake_toolkit"),
    }
    yield checkout
    for file in jobs.glob("*/pid"):
        if not (file.parent / "exit").exists():
            kill_session(int(file.read_text()))


def wait_until(condition, seconds=500):  # a loaded machine starts three trainings in minutes
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def kill_session(session: int) -> None:
    """Kill every process of a session, and what torchrun started in sessions of their own."""
    processes = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        processes[int(stat.parent.name)] = (int(words[1]), int(words[3]))
    doomed = {pid for pid, (_, sid) in processes.items() if sid == session}
    while more := {pid for pid, (parent, _) in processes.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture
def three_experiments(base_path) -> list[dict]:
    """Three experiments that differ in their learning rate."""
    return [experiment(base_path, learning_rate=rate) for rate in (1e-3, 2e-3, 3e-3)]
