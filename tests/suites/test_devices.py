"""What a GPU would refuse, without one: the suite runs in a process of its own."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_one_device_and_two_give_what_the_cpu_gives():
    suite = [sys.executable, "-m", "tests.suites.devices"]
    done = subprocess.run(suite, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
