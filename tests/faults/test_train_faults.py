"""The short version of `train_faults.py`."""

import random
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.faults import train_faults


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return train_faults.World(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "count"), [("kill", 3), ("term", 3), ("flip", 30)])
def test_training_survives(world, fault, count):
    assert train_faults.FAULTS[fault](world, count, random.Random(1))


@pytest.mark.slow
def test_training_survives_a_full_disk():
    mount = ("unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt")
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs unshare -rm")
    command = ("unshare", "-rm", sys.executable, "-m", "tests.faults.train_faults", "disk", "--count", "2")
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
