"""The command of a job, through real bash."""

import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dssk.commands.train import parse_args
from dssk.errors import DsskError
from dssk.jobs.command import NOT_SENT, SCRIPT, job_command, job_flags, launcher, with_logs_and_signals
from dssk.jobs.slurm import batch_script
from dssk.training.flags import RunArgs
from dssk.training.run import stored_experiment

EXP_ID = "0123456789abcdef" * 2
FIELDS = (
    "savedir_base",
    "data_path",
    "wandb_entity_name",
    "wandb_project_name",
    "wandb_run_name",
    "push_to_hub",
)
PIECES = [
    *(
        "; touch CANARY;",
        "$(touch CANARY)",
        "`touch CANARY`",
        "\ntouch CANARY\n",
        "| touch CANARY",
        "&& touch CANARY",
    ),
    *(
        "> CANARY",
        "& touch CANARY &",
        "'; touch CANARY; '",
        '"; touch CANARY; "',
        "\\'; touch CANARY;",
        "#",
        "$HOME",
    ),
    *(
        "'",
        '"',
        "\\",
        "\\\\",
        "$",
        "!!",
        "*",
        "?",
        "~",
        "[a-z]*",
        "{a,b}",
        "${IFS}",
        "\t",
        "\r",
        "\x01",
        "\x7f",
        "%j",
    ),
    *(
        "--help",
        "-r",
        "--reset=1",
        "NGPUS",
        "<exp_id>",
        "{user}",
        "é",
        "日本",
        "\u202e",
        "a",
        " ",
        "=",
        "None of it",
    ),
]
DUMP = "printf '%s\\0'"  # as --python_binary it shows the words that bash makes of what follows


def hostile_strings(count: int) -> list[str]:
    """Every piece by itself, then random joins of them, always the same ones."""
    generator = random.Random(0)
    joins = [
        "".join(generator.choices(PIECES, k=generator.randint(2, 6))) for _ in range(count - len(PIECES))
    ]
    return PIECES + joins


def arguments(**fields) -> RunArgs:
    values = {"savedir_base": "/out", "data_path": "/data", "python_binary": DUMP} | fields
    return parse_args(
        ["-e", "group", "-j", "toolkit", *(f"--{name}={value}" for name, value in values.items())]
    )


def bash(command: str, folder: Path, **options) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, check=True, **options)
    return done.stdout.decode()


def test_500_hostile_strings_in_six_fields_reach_the_job_as_they_are(tmp_path):
    for text in hostile_strings(500):
        args = arguments(**dict.fromkeys(FIELDS, text))
        words = bash(job_command(args, EXP_ID, 2, Path(text)), tmp_path).split("\0")[:-1]
        assert words == [SCRIPT, *job_flags(args, EXP_ID)]
        received = parse_args(words[1:])
        assert [getattr(received, name) for name in FIELDS] == [text] * len(FIELDS)
        assert not list(tmp_path.iterdir()), text


def test_the_strings_are_hostile_indeed_in_the_command_that_haven_builds(tmp_path):
    harmed = 0
    for text in hostile_strings(60):
        command = f"true {SCRIPT} --exp_id {EXP_ID} --savedir_base {text}"  # haven_wizard.py 0.7.3
        subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
        harmed += any(tmp_path.iterdir())
        (tmp_path / "CANARY").unlink(missing_ok=True)
    assert harmed > 5


def test_hostile_folders_hold_through_the_toolkits_and_slurms_wrapping(tmp_path):
    work = tmp_path / "work"
    commands = tmp_path / "commands"
    for folder in (work, commands):
        folder.mkdir()
    (commands / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (commands / "srun").chmod(0o755)
    for number, text in enumerate(hostile_strings(90)[::2]):
        base = tmp_path / str(number) / text.replace("/", "_")
        savedir = base / EXP_ID
        (savedir / "code").mkdir(parents=True)
        args = arguments(savedir_base=str(base), wandb_run_name=text)
        command = job_command(args, EXP_ID, 1, savedir / "key")
        bash(with_logs_and_signals(command, savedir), work)
        expected = [SCRIPT, *job_flags(args, EXP_ID)]
        assert (savedir / "logs.txt").read_bytes().decode().split("\0")[:-1] == expected
        environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        assert bash(batch_script(command, 1, savedir), work, env=environment).split("\0")[:-1] == expected
        assert (savedir / "job_ended").read_text() == "7 0\n"
        assert not list(work.iterdir()), text
        assert sorted(file.name for file in savedir.rglob("*")) == [
            "code",
            "err.txt",
            "job_ended",
            "logs.txt",
        ]


def test_no_hostile_string_is_an_experiments_id(tmp_path):
    for text in [*hostile_strings(500), "../evil", "..", "", "A" * 32, f"{EXP_ID}\n", "０" * 32]:
        with pytest.raises(DsskError, match="want 32 hexadecimal digits"):
            stored_experiment(tmp_path, text)


def test_a_job_gets_its_id_and_no_reset_group_override_or_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    args = parse_args(
        [
            *"-e group -j toolkit -r 1 -sb /out --data_path /data --set seed=1 --job_action reset".split(),
            *"--deepspeed /ds.json --local_rank 3 --wandb_log_gradients true".split(),
        ]
    )
    command = job_command(args, EXP_ID, 2, Path("/repo/.wandb_key"))
    flags = shlex.split(command.split(SCRIPT)[1])
    names = {flag.split("=")[0].removeprefix("--") for flag in flags}
    assert "secret" not in command
    assert not names & NOT_SENT
    assert "--wandb_log_gradients=True" in flags
    assert not [flag for flag in flags if flag.endswith("None")]
    received = parse_args(flags)
    assert (received.exp_id, received.exp_group, received.reset) == (EXP_ID, None, False)
    assert (received.deepspeed, received.wandb_log_gradients) == ("/ds.json", True)


def test_a_job_of_an_installed_dssk_needs_no_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = bash(job_command(arguments(), EXP_ID, 2, Path("key")), tmp_path).split("\0")
    assert words[:4] == ["-m", "dssk", "train", f"--exp_id={EXP_ID}"]


def test_the_founding_documents_launch_command_runs_as_written(tmp_path):
    launch = f'source activate "{tmp_path}" ; "{tmp_path}"/torchrun --nproc-per-node NGPUS '
    (tmp_path / "activate").write_text("ACTIVATED=$1\n")
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\n{DUMP} "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    command = job_command(arguments(python_binary=launch, wandb_run_name="a b"), EXP_ID, 8, Path("key"))
    words = bash(command, tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}).split("\0")
    assert words[:4] == ["--nproc-per-node", "8", SCRIPT, f"--exp_id={EXP_ID}"]
    assert "--wandb_run_name=a b" in words


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("torchrun --nproc-per-node NGPUS ", "torchrun --nproc-per-node 4"),
        ("torchrun --nproc-per-node=$NGPUS", "torchrun --nproc-per-node=4"),
        ("torchrun --nproc-per-node '${NGPUS}'", "torchrun --nproc-per-node '4'"),
        ("MY_NGPUS=1 python", "MY_NGPUS=1 python"),
    ],
)
def test_ngpus_becomes_the_number_of_ranks(text, command):
    assert launcher(text, 4) == command


@pytest.mark.parametrize(
    "text", ["", " ", "torchrun '", 'a "b', "$(", "a\nb", "python \\", "if true", "a `b", "( a"]
)
def test_an_incomplete_launch_command_is_refused_in_one_line(text):
    with pytest.raises(DsskError, match="--python_binary is") as caught:
        launcher(text, 1)
    assert "\n" not in str(caught.value)


def test_a_stopped_job_hands_the_signal_on_once_and_keeps_the_exit_code(tmp_path):
    (tmp_path / "run.py").write_text(
        "import signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "print('ready', flush=True)\n"
        "while not got: time.sleep(0.02)\n"
        "time.sleep(0.5)\n"
        "print(len(got), 'signals', flush=True)\n"
        "sys.exit(75)\n"
    )
    command = with_logs_and_signals(f"true ; {sys.executable} run.py", tmp_path)
    job = subprocess.Popen(["bash", "-c", command], cwd=tmp_path)
    logs = tmp_path / "logs.txt"
    while not (logs.exists() and "ready" in logs.read_text()):
        assert job.poll() is None
    job.terminate()
    assert job.wait() == 75
    assert logs.read_text() == "ready\n1 signals\n"
    assert (tmp_path / "err.txt").read_text() == ""
