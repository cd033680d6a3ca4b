"""Ten kills in every run of the tests; `kill_preproc.py` does as many as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_preproc.py")


@pytest.mark.slow
def test_ten_kills_end_bit_identical():
    command = [sys.executable, SCRIPT, "--kills", "10", "--num_proc", "1", "1", "1", "1", "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills, all bit-identical" in done.stdout
