"""The short version of `train_faults.py`."""

import random
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.faults import train_faults


@pytest.mark.slow
def test_training_survives_being_stopped(tmp_path):
    assert train_faults.term(train_faults.World(tmp_path), 3, random.Random(1))


@pytest.mark.slow
def test_training_survives_a_full_disk():
    mount = ("unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt")
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs unshare -rm")
    command = ("unshare", "-rm", sys.executable, "-m", "tests.faults.train_faults", "disk", "--count", "2")
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
