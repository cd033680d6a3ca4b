"""`dssk train` finds what to train in the current directory; trainval.py gives what lies beside it."""

import pytest

from dssk.commands import train
from dssk.errors import exit_code_of
from exp_configs import EXP_GROUPS

RUN = ["-e", "g", "-sb", "out", "--data_path", "data"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, words, code=2, **given) -> str:
    assert exit_code_of(lambda: train.main(words, **given)) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


def test_list_names_every_group(capsys):
    assert [line.split()[0] for line in said(capsys, ["--list"], 0, groups=EXP_GROUPS).splitlines()] == list(
        EXP_GROUPS
    )


def test_list_says_which_states_are_read(capsys):
    of = dict(line.split(None, 1) for line in said(capsys, ["--list"], 0, groups=EXP_GROUPS).splitlines())
    assert "merged, from states of layer last" in of["merged_tiny"]
    assert "from states of layer 9+18, 12 layers of it run again" in of["merged_replay_two_smollm2-135m"]


def test_list_reads_the_file_of_the_flag(here, capsys):
    layout = (
        '{"model_path": "m", "num_cross_attn_layers": 1, "cross_attn_layers_stride": 2, "context_size": 8}'
    )
    merged = '{"model_path": "m", "reader": "merged", "encode_layer": 18, "context_size": 8}'
    (here / "mine.py").write_text(f"import beside\nEXP_GROUPS = {{beside.NAME: [{layout}], 'b': [{merged}]}}")
    (here / "beside.py").write_text("NAME = 'mine'")
    expected = "mine  m, 1 blocks at stride 2, 8 tokens\nb     m, merged, from states of layer 18, 8 tokens\n"
    assert said(capsys, ["--list", "--exp_configs", "mine.py"], 0, groups=EXP_GROUPS) == expected


def test_an_experiment_that_is_stored_takes_no_changes(here, capsys):
    words = ["--exp_id", "0" * 32, "-sb", "runs", "--data_path", "data", "--set", "learning_rate=1"]
    with pytest.raises(SystemExit):
        train.main(words)
    assert "--set changes an experiment of --exp_group" in capsys.readouterr().err


def test_a_flag_without_its_value_is_one_line(here, capsys):
    with pytest.raises(SystemExit):
        train.main([*RUN, "--exp_configs"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dssk: error: argument --exp_configs: expected one argument")


def test_a_missing_file_is_named_with_what_to_do(here, capsys):
    message = (
        f"no file exp_configs.py in {here}: go to the folder that holds it, or name one with --exp_configs"
    )
    assert said(capsys, RUN).startswith(f"dssk: error: {message}")
    (here / "exp_configs.py").write_text("EXP_GROUPS = {'g': [{}]}")
    assert "no file job_configs.py in" in said(capsys, [*RUN, "-j", "slurm"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\ny = 2 +\n", "exp_configs.py:2: SyntaxError: invalid syntax"),
        ("x = [0.1ing_rate': 1]\n", "exp_configs.py:1: SyntaxError"),
        ("x = 1\n\ny = nothing\n", "exp_configs.py:3: NameError: name 'nothing' is not defined"),
        ("EXP_GROUP = {}", "exp_configs.py defines no EXP_GROUPS"),
        ("EXP_GROUPS = []", "exp_configs.py defines no EXP_GROUPS"),
        ("EXP_GROUPS = {'g': [[1]]}", "EXP_GROUPS['g'] is no group: want a list of experiments, each a dict"),
        ("EXP_GROUPS = {'g': [{1: 2}]}", "EXP_GROUPS['g'] is no group"),
        ("EXP_GROUPS = {'g': []}", "EXP_GROUPS['g'] is no group"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(here, capsys, content, message):
    (here / "exp_configs.py").write_text(content)
    line = said(capsys, RUN)
    assert message in line
    assert line.count("\n") == 1
