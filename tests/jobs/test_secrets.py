"""A key that is recognised wherever it turns up, on the whole way from preprocessing to a crashed job."""

import gzip
import threading
from pathlib import Path

import pytest

from dssk.config import experiment_id
from tests.conftest import encode_rows, experiment, question_rows
from tests.jobs.conftest import TOOLKIT_JOB, wait_until

KEY = "c4n4ry0" * 6  # as long as a real one may be
CRASH = """\
import runpy, sys
import dssk.training.run

def save_fused(*arguments):
    raise RuntimeError("out of luck")

dssk.training.run.save_fused = save_fused
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LAUNCH = """
./copy_wandb_key.sh
python trainval.py -e crossattn_test --steps 4 --log_every 2 -sb "{savedir}" --data_path "{data}" -r 1 \\
  --wandb_entity_name me --wandb_project_name project --wandb_run_name run --generation_eval_samples 4 \\
  --python_binary "python crash.py" -j toolkit
"""


class CommandLines(threading.Thread):
    """Looks for the key on the command line of every process, twenty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found: list[str] = []
        self.looks = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            self.looks += 1
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = file.read_bytes()
                except OSError:
                    continue
                if KEY.encode() in line:
                    self.found.append(line.decode())


def content(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def files_with_the_key(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in content(file)]


@pytest.mark.slow
def test_a_key_is_found_nowhere_but_in_its_file(toolkit, tmp_path, base_path, monkeypatch):
    pytest.importorskip("wandb", reason='wandb is not installed: pip install "dssk[wandb]"')
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    exp_dict = experiment(base_path)
    toolkit.configure([exp_dict], TOOLKIT_JOB | {"num_processes": 1})
    (toolkit.root / "crash.py").write_text(CRASH)
    watch = CommandLines()
    watch.start()
    store = encode_rows(base_path, tmp_path, question_rows(12))
    savedir_base = tmp_path / "exp data"
    del toolkit.environment["WANDB_API_KEY"]
    done = toolkit.bash(LAUNCH.format(savedir=savedir_base, data=store), WANDB_MODE="offline")
    savedir = savedir_base / experiment_id(exp_dict)
    wait_until(lambda: list(Path(toolkit.environment["FAKE_TOOLKIT"]).glob("*/exit")))
    watch.over.set()
    watch.join()

    assert "out of luck" in (savedir / "err.txt").read_text(), (savedir / "err.txt").read_text()
    assert list(savedir.glob("checkpoint-4")), "it trained"
    assert list(savedir.rglob("*.wandb")), "wandb was there"
    assert KEY not in done.stdout + done.stderr
    assert watch.looks > 20
    assert not watch.found
    assert files_with_the_key(tmp_path) == [toolkit.root / ".wandb_key"]
    assert not list(savedir_base.rglob(".wandb_key"))
    for planted in (savedir / "code" / "x", savedir / "y.gz"):  # the search does find one
        planted.write_bytes(gzip.compress(KEY.encode()) if planted.suffix else KEY.encode())
        assert planted in files_with_the_key(tmp_path)
