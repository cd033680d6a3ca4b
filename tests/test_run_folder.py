"""What is read from a run's folder, whatever became of it."""

import json

import pytest
from pydantic import BaseModel

from dssk import run_folder
from dssk.checkpoint import finish_checkpoint
from dssk.config import experiment_id
from dssk.errors import DamagedData, DsskError
from tests.conftest import experiment


@pytest.fixture
def savedir(tmp_path):
    exp_dict = experiment("base")
    folder = tmp_path / experiment_id(exp_dict)
    folder.mkdir()
    run_folder.write_experiment(folder, exp_dict)
    return folder


def make_model(folder, step: int) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    finish_checkpoint(folder, {"step": step})


def write_scores(folder, em: float, **more) -> None:
    (folder / "scores.json").write_text(json.dumps({"with_context": {"em": em}, **more}))


def em(savedir):
    return run_folder.newest_scores(savedir).get("with_context", {}).get("em")


def test_the_scores_of_a_run_are_those_of_its_newest_model_not_of_its_newest_file(savedir):
    make_model(savedir / "checkpoint-8", 8)
    make_model(savedir / "checkpoint-9", 9)
    write_scores(savedir / "checkpoint-9", 0.9)
    write_scores(savedir / "checkpoint-8", 0.8)  # written later, of an older model
    assert em(savedir) == 0.9
    write_scores(savedir, 0.7, step=8)
    assert em(savedir) == 0.9
    make_model(savedir / "final", 10)
    assert em(savedir) is None
    write_scores(savedir, 1.0, step=10)
    assert em(savedir) == 1.0


def test_scores_without_a_step_are_of_the_model_that_they_lie_in(savedir):
    make_model(savedir / "checkpoint-8", 8)
    make_model(savedir / "final", 9)
    write_scores(savedir / "checkpoint-8", 0.8)
    assert em(savedir) is None
    write_scores(savedir / "final", 0.9)
    assert em(savedir) == 0.9


def test_a_model_that_says_no_step_has_the_scores_of_its_own_folder_alone(savedir):
    (savedir / "model").mkdir()
    write_scores(savedir, 0.5)
    assert run_folder.scores_of(savedir / "model") == {}
    write_scores(savedir / "model", 0.6)
    assert run_folder.scores_of(savedir / "model")["with_context"]["em"] == 0.6


def test_damaged_scores_are_none_in_a_table_and_an_error_where_they_are_asked_for(savedir):
    make_model(savedir / "final", 9)
    (savedir / "scores.json").write_text("[" * 100_000)
    assert em(savedir) is None
    with pytest.raises(DamagedData, match="scores.json is damaged: it is nested too deeply"):
        run_folder.scores_of(savedir / "final")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"em": "high"}, "with_context: em is 'high'"),
        ({"em": 0.5, "by_class": {"span": 1}}, "with_context: by_class.span is 1"),
        ({"em": 0.5, "by_context_tokens": {"low": 1}}, "with_context: by_context_tokens is"),
        ({"em": 0.5, "by_context_tokens": [{"low": 1, "em": 0.5}]}, "by_context_tokens.high is missing"),
    ],
)
def test_scores_that_are_none_are_named(savedir, row, what):
    (savedir / "scores.json").write_text(json.dumps({"with_context": row}))
    with pytest.raises(DamagedData, match=f"scores.json is damaged: .*{what}"):
        run_folder.read_scores(savedir)


def test_what_a_run_at_wandb_is_called_must_be_text(savedir):
    (savedir / "wandb.json").write_text(json.dumps({"id": "a", "entity": ["e"], "project": "p"}))
    with pytest.raises(DamagedData, match=r"wandb.json is damaged: entity is \['e'\], want a text"):
        run_folder.read_wandb(savedir)
    (savedir / "wandb.json").write_text(json.dumps({"id": "a", "entity": None, "project": "p"}))
    assert run_folder.read_wandb(savedir)["id"] == "a"


def test_damaged_lines_of_the_metrics_are_left_out(savedir):
    lines = [
        b'{"step": 1, "loss": 2.0}',
        b"\xff\xfe",
        b"[1]",
        b'{"loss": 3}',
        b'{"step": "2"}',
        b'{"step": true}',
    ]
    (savedir / "metrics.jsonl").write_bytes(
        b"\n".join([*lines, b'{"step": 2, "loss": NaN}', b'{"step": 3, "lo'])
    )
    whole, damaged = run_folder.split_metrics(savedir)
    assert [line["step"] for line in whole] == [1, 2]
    assert damaged == 6


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", "[" * 100_000])
def test_an_experiment_that_is_none_is_one_line(savedir, content):
    (savedir / "exp_dict.json").write_text(content)
    for read in (
        lambda: run_folder.read_experiment(savedir),
        lambda: run_folder.stored_experiment(savedir.parent, savedir.name),
        lambda: run_folder.write_experiment(savedir, experiment("base")),
    ):
        with pytest.raises(DamagedData, match="exp_dict.json is damaged"):
            read()
    assert run_folder.read_status(savedir) == {}


def test_a_run_is_found_by_itself_and_as_the_only_one_of_a_folder(savedir, tmp_path):
    assert run_folder.find_run(savedir) == run_folder.find_run(tmp_path) == savedir
    other = tmp_path / "other"
    other.mkdir()
    (other / "exp_dict.json").write_text("{}")
    with pytest.raises(DsskError, match="holds 2 runs"):
        run_folder.find_run(tmp_path)
    with pytest.raises(DsskError, match="no run at"):
        run_folder.find_run(tmp_path / "nowhere")


def test_runs_that_are_moved_aside_keep_apart(savedir):
    for number in range(3):
        savedir.mkdir(exist_ok=True)
        (savedir / str(number)).touch()
        run_folder.move_aside(savedir)
        assert not savedir.exists()
    run_folder.move_aside(savedir)  # nothing there
    assert len(list((savedir.parent / "deleted").iterdir())) == 3


def test_predictions_must_be_whole(savedir):
    (savedir / "predictions.jsonl").write_text('{"id": "1"}\n{"id"')
    with pytest.raises(DamagedData, match="predictions.jsonl is damaged: line 2 "):
        run_folder.read_answered(savedir / "predictions.jsonl", BaseModel)
