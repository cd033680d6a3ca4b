import importlib.util
import re

import pytest

import exp_configs
from dssk.errors import DsskError
from dssk.jobs.config import CONFIGS, parse_job_config, toolkit_account
from tests.conftest import REPOSITORY

RESOURCES = {"gpu": 2}
TOOLKIT = {"image": "image", "resources": RESOURCES}


def example(scheduler: str):
    file = REPOSITORY / "resources" / f"job_configs_{scheduler}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scheduler", CONFIGS)
def test_the_examples_are_valid_for_groups_that_exist(scheduler):
    configs = example(scheduler).JOB_CONFIG
    assert set(configs) <= {"default", *exp_configs.EXP_GROUPS}
    for group in configs:
        config = parse_job_config(scheduler, group, configs)
        assert config.num_ranks >= 1


def test_a_group_without_an_entry_gets_the_default():
    configs = {"default": {"gpus": 1}, "big": {"gpus": 8, "nodes": 2}}
    assert parse_job_config("slurm", "other", configs).num_ranks == 1
    assert parse_job_config("slurm", "big", configs).num_ranks == 8
    assert parse_job_config("slurm", None, configs).num_ranks == 1


def test_ranks_are_the_gpus_unless_said_otherwise():
    ranks = [
        parse_job_config("toolkit", "g", {"g": TOOLKIT | changes}).num_ranks
        for changes in ({}, {"num_processes": 3}, {"resources": {"gpu": 0}})
    ]
    assert ranks == [2, 3, 1]


def test_the_toolkits_specification_names_the_user_and_leaves_out_what_is_not_set():
    config = parse_job_config(
        "toolkit", "g", {"g": TOOLKIT | {"data": ["team.{user}.home:/mnt"], "job_spec": {"x": 1}}}
    )
    assert config.spec("ann") == {
        **{"image": "image", "data": ["team.ann.home:/mnt"], "environment_vars": [], "resources": RESOURCES},
        **{"restartable": True, "interactive": False, "x": 1},
    }


def test_slurms_options_are_words_of_their_own():
    config = parse_job_config(
        "slurm",
        "g",
        {
            "g": {
                "partition": "a b",
                "gpus": 2,
                "gpu_type": "a100",
                "time": "1:00:00",
                "options": ["--exclusive"],
            }
        },
    )
    assert config.spec() == {
        "nodes": 1,
        "options": [
            *("--partition=a b", "--gres=gpu:a100:2", "--time=1:00:00", "--signal=TERM@120", "--requeue"),
            "--exclusive",
        ],
    }


@pytest.mark.parametrize(
    ("scheduler", "config", "message"),
    [
        ("slurm", {"gpu": 1}, "unknown key gpu, did you mean gpus?"),
        ("slurm", {"gpus": "1", "nodes": 0}, "nodes is 0.*gpus is '1'"),
        ("slurm", TOOLKIT, "unknown key image.*unknown key resources"),
        ("toolkit", {"image": "i"}, "key resources is missing"),
        ("toolkit", TOOLKIT | {"resources": {"gpu": -1}}, "resources.gpu is -1"),
        ("toolkit", TOOLKIT | {"environment_vars": ["WANDB_API_KEY=1"]}, "WANDB_API_KEY looks like a secret.*copy_"),
        ("toolkit", TOOLKIT | {"environment_vars": ["HF_TOKEN=1"]}, "HF_TOKEN looks like a secret"),
        ("toolkit", TOOLKIT | {"job_spec": {"environment_vars": ["HF_TOKEN=1"]}}, "HF_TOKEN looks like a secret"),
        ("toolkit", TOOLKIT | {"job_spec": {"environment_vars": ("A=1", "HF_TOKEN=1")}}, "HF_TOKEN looks like"),
        ("toolkit", TOOLKIT | {"job_spec": {"environment_vars": {"WANDB_API_KEY": "1"}}}, "WANDB_API_KEY looks"),
        ("toolkit", TOOLKIT | {"job_spec": {"a": [{"env": frozenset({"X_SECRET=1"})}]}}, "X_SECRET looks like"),
        ("toolkit", TOOLKIT | {"job_spec": {"env": [{"name": "HF_TOKEN", "value": "1"}]}}, "HF_TOKEN looks like"),
        ("toolkit", TOOLKIT | {"job_spec": {"env": [b"HF_TOKEN=1"]}}, "job_spec: holds a bytes, want texts"),
        ("toolkit", TOOLKIT | {"job_spec": {"env": iter(["HF_TOKEN=1"])}}, "job_spec: holds a list_iterator"),
        ("slurm", {"account": "a\0b"}, r"account: it holds a character that cannot be printed"),
        ("slurm", {"options": ["--exclusive", "--comment=\ud800"]}, "options: it holds a character"),
        ("slurm", {"partition": "a\nb"}, "partition: it holds a character"),
        ("toolkit", TOOLKIT | {"job_spec": {"a": [{"b\0": 1}]}}, "job_spec: it holds a character"),
        ("toolkit", TOOLKIT | {"job_spec": {"a": frozenset({"b\0"})}}, "job_spec: it holds a character"),
        ("gcp", {}, "--job_scheduler is gcp, want toolkit or slurm"),
    ],
)  # fmt: skip
def test_a_faulty_job_configuration_is_one_line(scheduler, config, message):
    with pytest.raises(DsskError) as caught:
        parse_job_config(scheduler, "g", {"g": config})
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_what_is_no_secret_passes():
    spec = {"name": "tokenizer-run", "environment_vars": ["A=tokens"], "resources": {"gpu": 1, "x": None}}
    assert (
        parse_job_config("toolkit", "g", {"g": TOOLKIT | {"job_spec": spec}}).spec("ann")["name"]
        == "tokenizer-run"
    )


@pytest.mark.parametrize("configs", [None, [], "text", {"g": None}, {"g": [1]}])
def test_a_job_configuration_that_is_no_mapping_is_one_line(configs):
    with pytest.raises(DsskError, match="JOB_CONFIG"):
        parse_job_config("slurm", "g", configs)


def test_a_missing_job_configuration_names_the_example_to_start_from():
    with pytest.raises(DsskError, match="no entry for g and no 'default'.*resources/job_configs_slurm.py"):
        parse_job_config("slurm", "g", {})
    assert (REPOSITORY / "resources" / "job_configs_slurm.py").exists()


def test_the_account_must_be_known(monkeypatch):
    monkeypatch.setenv("EAI_ACCOUNT_ID", "17")
    assert toolkit_account({"17": "ann"}) == ("17", "ann")
    with pytest.raises(DsskError, match='account 17 is not in EAI_ACCOUNT_ID_TO_USER.*add "17"'):
        toolkit_account({})
    monkeypatch.delenv("EAI_ACCOUNT_ID")
    with pytest.raises(DsskError, match="EAI_ACCOUNT_ID is not set"):
        toolkit_account({})
