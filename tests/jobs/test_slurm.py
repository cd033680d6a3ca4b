"""Slurm's answers, from stand-ins for its commands; tests/cluster has the real ones."""

import pytest

from dssk.errors import DsskError, EnvironmentFault
from dssk.jobs import slurm
from dssk.jobs.states import ALIVE, CANCELLED, COMPLETED, FAILED, GONE, RUNNING, STATES, state_of
from tests.jobs.conftest import executable

# Every state of `man squeue` and `man sacct` (Slurm 22.05 to 24.11), by what it means for a job of ours.
OF_SLURM = {
    "alive": "PENDING CONFIGURING COMPLETING RUNNING RESIZING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD "
    "SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED POWER_UP_NODE UPDATE_DB RECONFIG_FAIL",
    "failed": "BOOT_FAIL DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT LAUNCH_FAILED",
    "cancelled": "CANCELLED REVOKED",
    "completed": "COMPLETED",
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands: `commands(squeue="echo 1 RUNNING")`."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            executable(folder / name, script)

    return make


@pytest.mark.parametrize("kind", OF_SLURM)
def test_every_state_of_slurm_has_a_meaning_that_haven_knows(kind):
    from_haven = {"alive": ALIVE, "failed": (FAILED,), "cancelled": (CANCELLED,), "completed": (COMPLETED,)}
    for name in OF_SLURM[kind].split():
        assert name in {state for states in STATES.values() for state in states.split()}
        assert state_of(name) in from_haven[kind]


def test_havens_own_lists_have_our_five_states():
    haven_jobs = pytest.importorskip("haven.haven_jobs", reason="haven-ai is not installed")
    assert set(ALIVE) <= set(haven_jobs.ALIVE_STATES)
    assert COMPLETED in haven_jobs.COMPLETED_STATES
    assert {FAILED, CANCELLED} <= set(haven_jobs.FAILED_STATES)


@pytest.mark.parametrize(
    ("reported", "state"),
    [("CANCELLED by 1000", CANCELLED), ("CANCELLED+", CANCELLED), ("NEW_STATE", FAILED), ("", FAILED)],
)
def test_decorated_and_unknown_states_are_understood(reported, state):
    assert state_of(reported) == state


def test_ended_jobs_are_asked_of_the_accounting(commands):
    commands(squeue="echo 1 RUNNING", sacct='echo "2|OUT_OF_MEMORY"; echo "3|CANCELLED by 0"')
    jobs = slurm.get_jobs_dict(None, ["1", "2", "3", "4"])
    assert [job["state"] for job in jobs.values()] == ["RUNNING", "OUT_OF_MEMORY", "CANCELLED by 0", GONE]


def test_without_accounting_what_squeue_forgot_is_gone_and_no_error(commands):
    commands(squeue="echo 1 PENDING", sacct="echo Slurm accounting storage is disabled >&2; exit 1")
    assert slurm.get_job(None, "2")["state"] == GONE
    assert state_of(GONE) == FAILED


@pytest.mark.parametrize(
    ("text", "state"),
    [("7 0", "COMPLETED"), ("7 1", "FAILED"), ("7 75", "PREEMPTED"), ("8 0", None), ("", None)],
)
def test_a_job_leaves_word_of_its_end(tmp_path, text, state):
    (tmp_path / slurm.JOB_ENDED).write_text(text)
    assert slurm.ended_state(tmp_path, "7") == state


def test_a_busy_controller_is_asked_again_but_never_given_a_job_twice(commands, tmp_path):
    count = tmp_path / "count"
    busy = f'echo x >>{count}; [ $(wc -l <{count}) -gt 2 ] && echo 1 RUNNING || {{ echo "timed out" >&2; exit 1; }}'
    commands(squeue=busy, sbatch=busy)
    assert slurm.get_job(None, "1")["state"] == "RUNNING"
    count.unlink()
    (tmp_path / "code").mkdir()
    with pytest.raises(EnvironmentFault, match="sbatch: timed out"):
        slurm.submit_job(None, None, "true", {"nodes": 1, "options": []}, str(tmp_path / "code"))
    assert count.read_text() == "x\n"


def test_submission_gives_sbatch_words_and_neither_secrets_nor_a_keyboard(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k4n4ry")
    monkeypatch.setenv("HF_TOKEN", "k4n4ry")
    seen = tmp_path / "seen"
    commands(sbatch=f'printf "%s\\n" "$@" >{seen}; env >>{seen}; cat >>{seen}; echo "12;cluster"')
    code = tmp_path / "100%j; x" / "code"
    code.mkdir(parents=True)
    job_id = slurm.submit_job(None, "acc ount", "true", {"nodes": 2, "options": ["--mem=1G"]}, str(code))
    lines = seen.read_text().splitlines()
    assert job_id == "12"
    assert "k4n4ry" not in seen.read_text()
    assert {"--account=acc ount", "--mem=1G", "--nodes=2", str(code.parent / "job.sh")} <= set(lines)
    assert f"--output={tmp_path}/100%%j; x/logs.txt" in lines


def test_killing_waits_until_the_job_is_gone(commands, tmp_path):
    asked = tmp_path / "asked"
    commands(
        squeue=f"echo x >>{asked}; [ $(wc -l <{asked}) -gt 3 ] && echo 1 CANCELLED || echo 1 COMPLETING",
        scancel=f"touch {tmp_path}/cancelled",
    )
    slurm.kill_job(None, "1")
    assert (tmp_path / "cancelled").exists()
    assert asked.read_text().count("x") == 4
    assert state_of("COMPLETING") == RUNNING


def test_no_slurm_is_one_line(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DsskError, match="squeue is not on PATH: -j slurm runs on a login node"):
        slurm.sanity_check()
