import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssk.commands.train import build_parser, parse_args
from tests.conftest import REPOSITORY

REQUIRED = ["-e", "crossattn_tiny", "-sb", "out", "--data_path", "data"]


def test_the_flags_are_these_and_no_others():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert flags == {
        *("-h", "--help", "-e", "--exp_group", "--exp_id", "--set", "-sb", "--savedir_base", "--data_path"),
        *(
            "-r",
            "--reset",
            "--steps",
            "--minutes",
            "--log_every",
            "--push_to_hub",
            "-j",
            "--j",
            "--job_scheduler",
        ),
        *("--wandb_entity_name", "--wandb_project_name", "--wandb_run_name", "--wandb_log_gradients"),
        *(
            "--save_total_limit",
            "--save_fused",
            "--generation_eval_samples",
            "--report_to",
            "--dry_run",
            "--list",
            "--exp_configs",
            "--job_configs",
        ),
        *("--job_action", "--python_binary", "--deepspeed", "--dist_url", "--local_rank"),
    }
    assert all(action.help for action in build_parser()._actions)


def test_the_founding_documents_local_launch_parses():
    args = parse_args(
        "-e crossattn_starcoderbase-3b --steps 25_000 --log_every 1_000 -sb /mnt/home/exp_data/crossattn_starcoder_nq "
        "-r 1 --data_path /mnt/dssk/data/hf_data/processed_data/starcoderbase-3b".split()
    )
    assert (args.steps, args.log_every, args.reset) == (25_000, 1_000, True)


def test_the_founding_documents_cluster_launch_parses():
    launch = "source activate /mnt/home/envs/p2 ; /mnt/home/envs/p2/bin/torchrun --nproc-per-node NGPUS "
    args = parse_args(
        [
            *"-e crossattn_starcoderbase-3b --steps 25_000 --log_every 1_000 --wandb_entity_name someone".split(),
            *"--wandb_project_name natural_questions --wandb_run_name crossattn_starcoderbase-3b".split(),
            *"--wandb_log_gradients false -sb /mnt/exp -r 1 --data_path /mnt/data --j toolkit".split(),
            *("--python_binary", launch),
        ]
    )
    assert (args.job_scheduler, args.python_binary, args.wandb_log_gradients) == ("toolkit", launch, False)


@given(
    steps=st.integers(1, 10**6),
    reset=st.booleans(),
    gradients=st.booleans(),
    run_name=st.none() | st.text(min_size=1).filter(lambda t: t != "None"),
    local_rank=st.integers(-1, 7),
)
def test_flags_survive_being_sent_again_as_name_and_value(steps, reset, gradients, run_name, local_rank):
    first = parse_args(
        [
            *REQUIRED,
            *(f"--steps={steps}", f"--reset={reset}", f"--wandb_log_gradients={gradients}"),
            *(f"--wandb_run_name={run_name}", f"--local_rank={local_rank}"),
        ]
    )
    again = [f"--{name}={value}" for name, value in vars(first).items() if name != "overrides"]
    assert parse_args(again) == first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*REQUIRED, "--step", "3"], "unknown flag --step, did you mean --steps?"),
        ([*REQUIRED, "--log_evry=3"], "unknown flag --log_evry, did you mean --log_every?"),
        ([*REQUIRED, "--steps", "0"], "got '0', want a whole number from 1 to 2147483648"),
        ([*REQUIRED, "--steps", "1" + "0" * 300], "want a whole number from 1 to 2147483648"),
        ([*REQUIRED, "--reset", "maybe"], "got 'maybe', want true or false"),
        ([*REQUIRED, "--job_action", "stop"], "got 'stop', want run, status, reset, kill, logs"),
        ([*REQUIRED, "extra"], "unexpected argument 'extra'"),
        ([*REQUIRED, "--exp_id", "0" * 32], "want one of --exp_group and --exp_id"),
        ([*REQUIRED, "--wandb_entity_name", "me"], "needs both --wandb_entity_name and --wandb_project_name"),
        (REQUIRED[2:], "want one of --exp_group and --exp_id"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dssk: error: ")
    assert message in line


def test_importing_the_package_loads_no_optional_library_and_leaves_the_random_state_alone():
    code = (
        "import sys, random, torch; before = torch.random.get_rng_state(); state = random.getstate(); import dssk, "
        "trainval; assert torch.equal(torch.random.get_rng_state(), before) and random.getstate() == state; "
        "print([m for m in ('wandb', 'haven', 'deepspeed', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert result.stdout.strip() == "[]"
