"""Jobs on a real Slurm: `pytest -m slurm tests/cluster`. tests/cluster/install_slurm.sh installs it."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dssk.config import experiment_id
from dssk.jobs import slurm as slurm_manager
from dssk.jobs.states import GONE, state_of
from tests.cluster.conftest import slurm, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

JOB = {"cpus": 2, "num_processes": 2}
LAUNCH = """
export LAUNCH_CMD="source activate {env} ; {env}/bin/torchrun --nproc-per-node NGPUS "
python trainval.py -e crossattn_test --steps {steps} --log_every {log_every} -sb "{savedir}" --data_path {data} \\
  --python_binary "${{LAUNCH_CMD}}" --j slurm {more}
"""


class User:
    """Someone at the login node."""

    def __init__(self, checkout, cluster, tmp_path, data):
        checkout.environment |= {"SLURM_CONF": cluster["SLURM_CONF"]}
        self.checkout, self.cluster, self.savedir_base = checkout, cluster, tmp_path / "exp data"
        self.names = {"env": tmp_path / "p2", "data": data, "savedir": self.savedir_base}

    def launch(self, more: str = "", steps: int = 40, log_every: int = 10) -> str:
        """What the command says."""
        script = LAUNCH.format(**self.names, steps=steps, log_every=log_every, more=more)
        return self.checkout.bash(script).stdout

    def wait_for_the_end(self) -> None:
        """Until nothing is queued or running."""
        wait_for(lambda: not slurm(self.cluster, "squeue", "--noheader"), 400)

    def job_id(self, exp_dict: dict) -> str:
        file = self.savedir_base / experiment_id(exp_dict) / "job_dict.json"
        return json.loads(file.read_text())["job_id"]


@pytest.fixture
def user(checkout, cluster, tmp_path, store_path):
    pytest.importorskip("haven", reason='haven-ai is not installed: pip install "dssk[haven]"')
    yield User(checkout, cluster, tmp_path, store_path)
    subprocess.run(["scancel", "--quiet", "--user=root"], env=cluster, check=False)


def test_a_group_trains_and_a_job_that_died_is_launched_again_and_resumes(user, three_experiments):
    user.checkout.configure(three_experiments, JOB)
    ids = [experiment_id(exp_dict) for exp_dict in three_experiments]
    submitted = user.launch("-r 1")
    assert submitted.count("SUBMITTED: Launching") == 3
    victim = user.savedir_base / ids[1]
    wait_for(lambda: list(victim.glob("checkpoint-*/dssk_manifest.json")), 200)
    kill_ranks(ids[1])
    user.wait_for_the_end()
    assert "2 COMPLETED, 1 FAILED" in user.launch("--job_action status")

    again = user.launch("--job_action run")
    assert again.count("IGNORED: Job COMPLETED") == 2
    assert f"{ids[1]}  SUBMITTED: Retrying FAILED Job" in again
    user.wait_for_the_end()
    assert "3 COMPLETED" in user.launch("--job_action status")
    assert "resuming from step" in (victim / "logs.txt").read_text()
    for exp_id, exp_dict in zip(ids, three_experiments, strict=True):
        assert json.loads((user.savedir_base / exp_id / "exp_dict.json").read_text()) == exp_dict
        assert (user.savedir_base / exp_id / "final" / "model.safetensors").exists()


def test_a_preempted_job_saves_queues_again_and_resumes(user, three_experiments):
    user.checkout.configure(three_experiments[:1], JOB)
    user.launch(steps=600, log_every=300)
    savedir = user.savedir_base / experiment_id(three_experiments[0])
    wait_for(lambda: running_for(savedir), 120)
    slurm(
        user.cluster,
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--cpus-per-task=2",
        "--wrap=sleep 5",
        "--output=/dev/null",
    )
    wait_for(lambda: list(savedir.glob("checkpoint-*/dssk_manifest.json")), 60)
    assert not (savedir / "checkpoint-300").exists(), (
        "it was not pre-empted before its first regular checkpoint"
    )
    user.wait_for_the_end()
    assert "1 COMPLETED" in user.launch("--job_action status")
    logs = (savedir / "logs.txt").read_text()
    assert "resuming from step" in logs
    assert logs.count("starting at step 0") == 1


def test_a_killed_job_ends_and_does_not_come_back(user, three_experiments):
    user.checkout.configure(three_experiments[:1], JOB)
    user.launch(steps=50_000, log_every=50_000)
    savedir = user.savedir_base / experiment_id(three_experiments[0])
    wait_for(lambda: running_for(savedir), 120)
    assert "1 CANCELLED" in user.launch("--job_action kill")
    time.sleep(5)
    assert "1 CANCELLED" in user.launch("--job_action status")
    assert "SUBMITTED: Retrying CANCELLED Job" in user.launch("--job_action run", steps=50_000)
    assert "1 CANCELLED" in user.launch("--job_action kill")


def test_torchrun_trains_over_two_nodes(user, three_experiments):
    user.checkout.configure(three_experiments[:1], {**JOB, "nodes": 2, "num_processes": 1})
    user.launch()
    savedir = user.savedir_base / experiment_id(three_experiments[0])
    user.wait_for_the_end()
    assert "1 COMPLETED" in user.launch("--job_action status")
    assert "2 ranks" in (savedir / "logs.txt").read_text()


def test_a_job_saves_before_its_time_limit_and_goes_on_later(user, three_experiments):
    user.checkout.configure(three_experiments[:1], {**JOB, "time": "00:01:00", "save_seconds": 20})
    user.launch(steps=1200, log_every=1200)
    savedir = user.savedir_base / experiment_id(three_experiments[0])
    wait_for(
        lambda: (
            (savedir / "logs.txt").exists() and "resuming from step" in (savedir / "logs.txt").read_text()
        ),
        300,
    )
    user.launch("--job_action kill", steps=1200)


def test_states_come_from_the_accounts_once_squeue_forgot_the_jobs(
    cluster_with_accounts, monkeypatch, tmp_path
):
    monkeypatch.setenv("SLURM_CONF", cluster_with_accounts["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster_with_accounts["PATH"])
    ends = {"COMPLETED": "true", "FAILED": "false", "CANCELLED": "sleep 60"}
    sbatch = ["sbatch", "--parsable", f"--output={tmp_path}/log"]
    ids = {end: slurm(cluster_with_accounts, *sbatch, f"--wrap={script}") for end, script in ends.items()}
    slurm_manager.kill_job(None, ids["CANCELLED"])
    wait_for(lambda: not slurm(cluster_with_accounts, "squeue", "--noheader", "--states=all"), 120)
    found = slurm_manager.get_jobs_dict(None, [*ids.values(), "999"])
    assert [state_of(found[job_id]["state"]) for job_id in ids.values()] == list(ends)
    assert found["999"]["state"] == GONE


def kill_ranks(exp_id: str) -> None:
    """Kill the training processes of an experiment, as the kernel does where memory is short."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if f"--exp_id={exp_id}".encode() in words and b"torch.distributed.run" not in words:
                os.kill(int(file.parent.name), signal.SIGKILL)


def running_for(savedir: Path, seconds: float = 3) -> bool:
    """Whether the training loop has been at it for a while."""
    logs = savedir / "logs.txt"
    return (
        logs.exists()
        and "starting at step" in logs.read_text()
        and time.time() - logs.stat().st_mtime > seconds
    )
