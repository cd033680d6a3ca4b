"""What `-j` does with the jobs of a group, in this process, on the fake toolkit; a job is a short bash command."""

import io
import json
import sys
import time
import types
from pathlib import Path

import pytest

from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.errors import DsskError, EnvironmentFault
from dssk.jobs import submit as submit_module
from dssk.jobs.submit import check_experiments, submit, with_absolute_paths
from dssk.training.run import chosen_experiments
from tests.conftest import REPOSITORY, experiment
from tests.jobs.conftest import ACCOUNT, TOOLKIT_JOB, executable, kill_session

EXPERIMENTS = [experiment("org/base", seed=seed) for seed in (1, 2)]
IDS = [experiment_id(exp_dict) for exp_dict in EXPERIMENTS]
GROUPS = {"pair": EXPERIMENTS}


class Machine:
    """A place to launch jobs from."""

    def __init__(self, folder: Path):
        self.savedir_base, self.jobs = folder / "out", folder / "toolkit"
        self.configs = types.SimpleNamespace(
            JOB_CONFIG={"default": TOOLKIT_JOB}, EAI_ACCOUNT_ID_TO_USER={ACCOUNT: "ann"}
        )

    def submit(self, *flags: str, job: str = "true") -> None:
        base = ["-e", "pair", "-j", "toolkit", "-sb", str(self.savedir_base), "--data_path", "data"]
        submit(parse_args([*base, "--python_binary", job, *flags]), GROUPS, self.configs)

    def wait(self, condition=lambda job: (job / "exit").exists()) -> None:
        while not all(condition(job) for job in self.jobs.iterdir()):
            time.sleep(0.02)

    def job_id(self, exp_id: str) -> str:
        return json.loads((self.savedir_base / exp_id / "job_dict.json").read_text())["job_id"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    pytest.importorskip("haven", reason='haven-ai is not installed: pip install "dssk[haven]"')
    machine = Machine(tmp_path)
    work = tmp_path / "work"
    for folder in (work, machine.jobs):
        folder.mkdir()
    (work / "trainval.py").touch()
    executable(tmp_path / "commands" / "eai", "echo Bearer of-the-test")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(REPOSITORY / "tests/jobs/fake_toolkit")
    monkeypatch.setenv("FAKE_TOOLKIT", str(machine.jobs))
    monkeypatch.setenv("EAI_ACCOUNT_ID", ACCOUNT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'commands'}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    import requests

    monkeypatch.setattr(requests, "get", requests.get)  # the fake client replaces it, for this test only
    import eai_toolkit_client

    monkeypatch.setattr(requests, "get", eai_toolkit_client.no_token)
    yield machine
    for file in machine.jobs.glob("*/pid"):
        if not (file.parent / "exit").exists():
            kill_session(int(file.read_text()))


def test_every_experiment_becomes_a_job_and_only_failed_ones_run_again(machine, capsys):
    machine.submit(job='[ "$(basename "$(dirname "$PWD")")" = ' + IDS[0] + " ] && true")
    machine.wait()
    capsys.readouterr()
    machine.submit("--job_action", "status")
    assert capsys.readouterr().out.splitlines()[-1] == "1 COMPLETED, 1 FAILED"
    machine.submit()
    machine.wait()
    assert len(list(machine.jobs.iterdir())) == 3
    out = capsys.readouterr().out
    assert f"{IDS[0]}  IGNORED: Job COMPLETED" in out
    assert f"{IDS[1]}  SUBMITTED: Retrying FAILED Job" in out
    machine.submit("--job_action", "status")
    assert capsys.readouterr().out.splitlines()[-1] == "2 COMPLETED"
    assert json.loads((machine.savedir_base / IDS[1] / "exp_dict.json").read_text()) == EXPERIMENTS[1]
    assert (machine.savedir_base / "results.ipynb").exists()


def test_reset_starts_afresh_what_does_not_run_and_moves_the_old_aside(machine):
    machine.submit(job="true")
    machine.wait()
    marks = [machine.savedir_base / exp_id / "mark" for exp_id in IDS]
    for number in range(3):
        for mark in marks:
            mark.touch()
        machine.submit("-r", "1")
        machine.wait()
        assert not any(mark.exists() for mark in marks)
        assert len(list(machine.savedir_base.glob("deleted/*/mark"))) == 2 * (number + 1)


def test_a_running_job_is_left_alone_by_reset_1_and_killed_by_the_action_reset(machine, capsys):
    machine.submit(job="sleep 60 ; true")
    machine.wait(lambda job: (job / "pid").exists())
    first = [machine.job_id(exp_id) for exp_id in IDS]
    capsys.readouterr()
    machine.submit("-r", "1")
    assert capsys.readouterr().out.count("IGNORED: Job RUNNING") == 2
    assert [machine.job_id(exp_id) for exp_id in IDS] == first
    machine.submit("--job_action", "reset")
    machine.wait()
    assert not set(first) & {machine.job_id(exp_id) for exp_id in IDS}
    assert len(list(machine.savedir_base.glob("deleted/*"))) == 2


def test_kill_ends_running_jobs_and_logs_shows_the_end_of_each(machine, capsys):
    machine.submit(job="echo hello ; sleep 60 ; true")
    machine.wait(lambda job: (job / "pid").exists())
    while sum("hello" in logs.read_text() for logs in machine.savedir_base.glob("*/logs.txt")) < 2:
        time.sleep(0.02)
    machine.submit("--job_action", "kill")
    machine.wait()
    capsys.readouterr()
    machine.submit("--job_action", "logs")
    out = capsys.readouterr().out
    assert out.count("hello") == 2
    assert "2 CANCELLED" in out


def test_a_job_that_the_scheduler_forgot_is_launched_again(machine, capsys):
    machine.submit()
    machine.wait()
    (machine.jobs / machine.job_id(IDS[0]) / "exit").unlink()
    (machine.jobs / machine.job_id(IDS[0])).rename(machine.savedir_base / "gone")
    capsys.readouterr()
    machine.submit()
    out = capsys.readouterr().out
    assert f"{IDS[0]}  SUBMITTED: Retrying FAILED Job" in out
    assert f"{IDS[1]}  IGNORED: Job COMPLETED" in out


def test_the_copy_of_the_code_has_no_dot_file_no_ignored_name_and_no_experiment(machine):
    work = Path.cwd()
    machine.savedir_base = work / "experiments"
    for name in (".wandb_key", ".git/config", "wandb/run", "keep/me.py", "keep/.env", "notes.txt"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("x")
    (work / ".havenignore").write_text("# names\nwandb\n*.txt\n")
    machine.submit()
    for exp_id in IDS:
        code = machine.savedir_base / exp_id / "code"
        files = sorted(str(file.relative_to(code)) for file in code.rglob("*") if file.is_file())
        assert files == ["keep/me.py", "trainval.py"]


def test_experiments_in_the_working_directory_itself_are_not_copied_into_themselves(machine):
    work = Path.cwd()
    machine.savedir_base = work
    for name in ("deleted/old/x.py", "keep/me.py"):
        (work / name).parent.mkdir(parents=True)
        (work / name).write_text("x")
    for _ in range(2):
        machine.submit()
        machine.wait()
    for exp_id in IDS:
        code = work / exp_id / "code"
        names = sorted(str(file.relative_to(code)) for file in code.rglob("*") if file.is_file())
        assert [name for name in names if not name.startswith("results.")] == ["keep/me.py", "trainval.py"]


def test_another_experiment_stored_under_the_same_id_is_never_replaced(machine):
    savedir = machine.savedir_base / IDS[0]
    savedir.mkdir(parents=True)
    (savedir / "exp_dict.json").write_text(
        json.dumps(EXPERIMENTS[0] | {"seed": "1"})
    )  # haven's hash is the same
    with pytest.raises(DsskError, match="is another experiment: seed was '1', is 1"):
        machine.submit()


def test_overrides_count_before_the_id_and_equal_experiments_are_one():
    args = parse_args("-e pair -j toolkit -sb out --data_path data --set context_size=64".split())
    assert [e["context_size"] for e in chosen_experiments(args, GROUPS)] == [64, 64]
    args = parse_args("-e pair -j toolkit -sb out --data_path data --set seed=5".split())
    assert chosen_experiments(args, GROUPS) == [EXPERIMENTS[0] | {"seed": 5}]


def test_a_single_stored_experiment_can_be_submitted(tmp_path):
    (tmp_path / IDS[1]).mkdir()
    (tmp_path / IDS[1] / "exp_dict.json").write_text(json.dumps(EXPERIMENTS[1]))
    args = parse_args(["--exp_id", IDS[1], "-j", "slurm", "-sb", str(tmp_path), "--data_path", "data"])
    assert chosen_experiments(args, GROUPS) == [EXPERIMENTS[1]]


def test_paths_hold_in_the_working_directory_of_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = with_absolute_paths(parse_args("-e pair -sb out --data_path ../data --deepspeed ds.json".split()))
    assert Path(args.savedir_base) == tmp_path / "out"
    assert Path(args.data_path).resolve() == tmp_path.parent / "data"
    assert args.deepspeed == str(tmp_path / "ds.json")


def test_a_base_in_a_relative_folder_is_refused_with_the_flag_that_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    args = parse_args("-e one -j slurm -sb out --data_path data".split())
    with pytest.raises(DsskError, match=f"use --set model_path={tmp_path}/base"):
        check_experiments(chosen_experiments(args, {"one": [experiment("base")]}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-e par -j toolkit", "unknown experiment group par, did you mean pair?"),
        ("-e pair -j gcp", "--job_scheduler is gcp, want toolkit or slurm"),
        (
            "-e pair -j slurm",
            "has no entry for pair and no 'default': start from resources/job_configs_slurm.py",
        ),
        ("-e pair -j toolkit --set sed=1", "unknown key sed, did you mean seed?"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(flags, message):
    args = parse_args(f"{flags} -sb out --data_path data".split())
    with pytest.raises(DsskError) as caught:
        submit(args, GROUPS, types.SimpleNamespace(JOB_CONFIG={}, EAI_ACCOUNT_ID_TO_USER={}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_haven_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "haven", None)
    monkeypatch.delitem(sys.modules, "dssk.jobs.haven", raising=False)
    args = parse_args("-e pair -j slurm -sb out --data_path data".split())
    configs = types.SimpleNamespace(JOB_CONFIG={"default": {}}, EAI_ACCOUNT_ID_TO_USER={})
    with pytest.raises(DsskError, match=r'pip install "dssk\[haven\]"'):
        submit(args, GROUPS, configs)


def test_without_the_toolkits_client_one_line_says_so(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "eai_toolkit_client", None)
    monkeypatch.delitem(sys.modules, "haven.haven_jobs.toolkit_manager", raising=False)
    import haven.haven_jobs

    monkeypatch.delattr(haven.haven_jobs, "toolkit_manager", raising=False)
    with pytest.raises(DsskError, match="needs the package eai_toolkit_client"):
        machine.submit()


@pytest.mark.parametrize(("answer", "action"), [("", "run"), ("kill", "kill"), (" logs ", "logs")])
def test_a_terminal_is_asked_and_a_script_is_not(monkeypatch, answer, action):
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert submit_module.ask() == action


def test_an_unknown_answer_is_one_line(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "go")
    with pytest.raises(DsskError, match="got 'go', want one of run, status, reset, kill, logs"):
        submit_module.ask()


@pytest.mark.parametrize("action", ["run", "status", "reset", "kill", "logs"])
def test_without_slurm_one_line_says_so(tmp_path, monkeypatch, action):
    pytest.importorskip("haven", reason='haven-ai is not installed: pip install "dssk[haven]"')
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = [
        "-e",
        "pair",
        "-j",
        "slurm",
        "-sb",
        str(tmp_path / "out"),
        "--data_path",
        "d",
        "--job_action",
        action,
    ]
    configs = types.SimpleNamespace(JOB_CONFIG={"default": {}}, EAI_ACCOUNT_ID_TO_USER={})
    with pytest.raises(DsskError, match="squeue is not on PATH: -j slurm runs on a login node"):
        submit(parse_args(argv), GROUPS, configs)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(machine):
    machine.savedir_base = Path("/proc/nope")
    with pytest.raises(EnvironmentFault, match="cannot write /proc/nope"):
        machine.submit()
    assert not list(machine.jobs.iterdir())
