"""Training through the functions and commands that users call, on a model of a few thousand parameters."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTBigCodeForCausalLM

from dssk.checkpoint import latest_checkpoint, load_model
from dssk.cli import parse_args
from dssk.config import experiment_id, parse_experiment
from dssk.data.store import load_rows
from dssk.errors import DamagedData, DsskError
from dssk.models.modeling import is_cross_attn
from dssk.training.run import train
from tests.conftest import REPOSITORY, experiment, make_base


@pytest.fixture
def run(base_path, store_path, tmp_path):
    """Train in this process; returns the run's folder."""

    def run(*flags: str, data_path=store_path, **changes):
        exp_dict = experiment(base_path, **changes)
        argv = ["-e", "group", "-sb", str(tmp_path), "--data_path", str(data_path), *flags]
        train(parse_args(argv), {"group": [exp_dict]})
        return tmp_path / experiment_id(exp_dict)

    return run


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in logged(folder) if "loss" in entry}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal_weights(one, other) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_checkpoints_of_the_blocks_alone_and_a_fused_model(run, base_path):
    folder = run("--steps", "4", "--log_every", "2")
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all(map(is_cross_attn, weights(folder / "checkpoint-4")))
    assert not (folder / "checkpoint-4" / "training_args.bin").exists()
    assert [e["step"] for e in logged(folder) if "eval_loss" in e] == [2, 4]
    assert json.loads((folder / "exp_dict.json").read_text())["model_path"] == str(base_path)
    fused = weights(folder / "final")
    for name, parameter in GPTBigCodeForCausalLM.from_pretrained(base_path).named_parameters():
        assert torch.equal(fused[name], parameter), name
    assert any(map(is_cross_attn, fused))


def test_a_checkpoint_and_the_fused_model_reload_to_bit_equal_logits(run, tokens):
    import dssk  # noqa: F401 - registers the class

    folder = run("--steps", "2", "--log_every", "2")
    ids, context = tokens(2, 7), tokens(2, 9)
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("checkpoint-2", "final")]
    models.append(load_model(folder)[0])
    outputs = [model(ids, context_input_ids=context).logits for model in models]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], models[0](ids).logits)


def test_training_lowers_the_loss(run):
    seen = losses(run("--steps", "60", "--log_every", "20", learning_rate=1e-2))
    assert seen[60] < 0.7 * seen[20]


@pytest.mark.parametrize(
    "changes",
    [{}, {"include_context_ids": True, "skip_steps": 4, "do_repetition_augmentations": True}],
    ids=str,
)
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(run, changes):
    # 18 training questions in batches of 4: the interruption after step 3 and the end lie in different epochs.
    whole = run("--steps", "8", "--log_every", "1", **changes)
    kept = whole.rename(whole.with_name("whole"))
    run("--steps", "8", "--log_every", "1", **changes)
    for step in range(4, 9):
        shutil.rmtree(whole / f"checkpoint-{step}")
    shutil.rmtree(whole / "final")
    resumed = run("--steps", "8", "--log_every", "1", **changes)
    assert equal_weights(resumed / "final", kept / "final")
    for step in range(1, 9):
        assert losses(resumed)[step] == losses(kept)[step], step


def test_an_incomplete_checkpoint_does_not_exist_for_resuming(run):
    folder = run("--steps", "2", "--log_every", "1")
    newest = folder / "checkpoint-2"
    assert latest_checkpoint(folder) == newest
    (newest / "optimizer.pt").write_bytes(b"cut")
    assert latest_checkpoint(folder) == folder / "checkpoint-1"
    (folder / "checkpoint-1" / "dssk_manifest.json").unlink()
    assert latest_checkpoint(folder) is None


def test_reset_moves_the_old_run_aside_and_starts_afresh(run, tmp_path):
    first = run("--steps", "2", "--log_every", "1")
    (first / "mark").touch()
    for times in (1, 2, 3):
        run("--steps", "1", "--log_every", "1", "-r", "1")
        assert not (first / "mark").exists()
        assert {f.name for f in first.glob("checkpoint-*")} == {"checkpoint-1"}
        assert len(list((tmp_path / "deleted").iterdir())) == times


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(run):
    one_by_one = {"train_batch_size": 1, "skip_steps": 4}
    at_once = losses(run("--steps", "3", "--log_every", "1", cross_attn_dropout_prob=0.0))
    in_turn = losses(run("--steps", "3", "--log_every", "1", cross_attn_dropout_prob=0.0, **one_by_one))
    assert in_turn == pytest.approx(at_once, abs=1e-5)


def test_encoding_in_the_training_step_equals_stored_encodings(run, store_path, base_path):
    flags = ("--steps", "3", "--log_every", "1")
    stored = losses(run(*flags, cross_attn_dropout_prob=0.0))
    online = losses(run(*flags, cross_attn_dropout_prob=0.0, encode_online=True))
    assert online == pytest.approx(stored, abs=0.02)  # what is stored is rounded to bfloat16


def test_bfloat16_trains_fp32_blocks(run):
    folder = run("--steps", "2", "--log_every", "2", bf16=True)
    assert {t.dtype for t in weights(folder / "checkpoint-2").values()} == {torch.float32}


@pytest.mark.parametrize("schedule", ["cosine", "constant", "reduce_lr_on_plateau"])
def test_every_schedule_trains(run, schedule):
    assert losses(run("--steps", "2", "--log_every", "1", lr_scheduler_type=schedule))


def test_label_smoothing_is_applied_to_shifted_labels_in_training_only(run):
    plain = logged(run("--steps", "1", "--log_every", "1", learning_rate=1e-9))
    smooth = logged(run("--steps", "1", "--log_every", "1", learning_rate=1e-9, label_smoothing_factor=0.2))
    assert abs(smooth[0]["loss"] - plain[0]["loss"]) > 1e-3
    assert smooth[1]["eval_loss"] == pytest.approx(plain[1]["eval_loss"], abs=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attn_layers_stride": 4}, "need 5 decoder layers, the model has 4"),
        ({"context_size": 257}, "context_size is 257, .* reads at most 256 tokens"),
        ({"fp16": True}, "there is no GPU"),
        ({"model_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(run, monkeypatch, changes, message):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    with pytest.raises(DsskError, match=message):
        run("--steps", "1", **changes)


def test_encodings_of_another_model_of_the_same_size_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    other = make_base(tmp_path / "other", seed=9)
    with pytest.raises(DsskError, match="contexts were encoded by .*other weights"):
        run("--steps", "1", model_path=str(other))


def test_an_unknown_group_is_refused_naming_the_nearest(tmp_path, store_path):
    args = parse_args(["-e", "crossattn_tin", "-sb", str(tmp_path), "--data_path", str(store_path)])
    with pytest.raises(DsskError, match="did you mean crossattn_tiny?"):
        train(args, {"crossattn_tiny": [], "other": []})


def test_a_stored_experiment_is_trained_by_its_id_and_refused_when_changed(
    run, base_path, store_path, tmp_path
):
    folder = run("--steps", "1", "--log_every", "1", seed=5)
    argv = ["--exp_id", folder.name, "-sb", str(tmp_path), "--data_path", str(store_path), "--steps", "2"]
    train(parse_args(argv), {})
    assert (folder / "checkpoint-2").exists()
    (folder / "exp_dict.json").write_text(json.dumps(experiment(base_path, seed=6)))
    with pytest.raises(DamagedData, match="it was changed"):
        train(parse_args(argv), {})
    for hostile in ("../evil", "x" * 32, "0" * 31):
        with pytest.raises(DsskError, match="want 32 hexadecimal digits"):
            train(parse_args(["--exp_id", hostile, *argv[2:]]), {})


# The commands


def command(*words: str, check: bool = True, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=check
    )


@pytest.fixture
def launch(base_path, store_path, tmp_path):
    """Run trainval.py on the tiny experiment by a launcher."""
    overrides = {
        k: v for k, v in experiment(base_path, cross_attn_dropout_prob=0.0).items() if k != "model_path"
    }

    def launch(*flags: str, launcher=(sys.executable,), check: bool = True):
        sets = [f"--set={key}={json.dumps(value)}" for key, value in overrides.items()]
        argv = ["trainval.py", "-e", "crossattn_tiny", f"--set=model_path={base_path}", *sets]
        where = ["-sb", str(tmp_path / "runs"), "--data_path", str(store_path)]
        return command(*argv, *where, *flags, launcher=launcher, check=check)

    return launch


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_what_one_process_trains(launch, tmp_path):
    flags = ("--steps", "1_0", "--log_every", "5", "-r", "1")
    launch("--set=train_batch_size=2", *flags, launcher=torchrun(2))
    (folder,) = (f for f in (tmp_path / "runs").iterdir() if f.name != "deleted")
    two = losses(folder), weights(folder / "final")
    launch("--set=train_batch_size=4", *flags)
    (other,) = (f for f in (tmp_path / "runs").iterdir() if f not in (folder, tmp_path / "runs" / "deleted"))
    # One process takes rows 0..3 where two ranks take 0, 1 and 2, 3: the same global batches.
    assert two[0] == pytest.approx(losses(other), abs=1e-5)
    for name, tensor in weights(other / "final").items():
        torch.testing.assert_close(two[1][name], tensor, atol=1e-5, rtol=1e-4)


def torchrun(ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks))


@pytest.mark.slow
def test_the_commands_train_resume_evaluate_and_answer(launch, store_path, tmp_path):
    assert "starting at step 0" in launch("--steps", "2", "--log_every", "2").stdout
    assert "resuming from step 2" in launch("--steps", "4", "--log_every", "2").stdout
    evaluated = command(
        *(
            "-m",
            "dssk.evaluation.evaluate",
            "--checkpoint",
            str(tmp_path / "runs"),
            "--data_path",
            str(store_path),
        ),
        *("--output", str(tmp_path / "scores.json"), "--max_questions", "6", "--max_new_tokens", "5"),
    )
    assert "with_context" in evaluated.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {scores[c]["n"] for c in ("with_context", "no_context", "wrong_context")} == {6}
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    ids = set(load_rows(store_path)["val"]["id"])
    assert len(lines) == 6
    assert {json.loads(line)["id"] for line in lines} <= ids
    (tmp_path / "text").write_text("Mill 3 was built in 1703.")
    answered = command(
        *(
            "-m",
            "dssk.evaluation.answer",
            "--checkpoint",
            str(tmp_path / "runs"),
            "--context",
            str(tmp_path / "text"),
        ),
        *("--question", "when", "--question", "who", "--max_new_tokens", "4"),
    )
    assert len(answered.stdout.splitlines()) <= 2
    assert answered.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepps", "3"], "unknown flag --stepps, did you mean --steps?"),
        (["--set=learning_rat=1"], "unknown key learning_rat, did you mean learning_rate?"),
        (["--set=num_cross_attn_layers=9"], "need 17 decoder layers, the model has 4"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(launch, flags, message):
    result = launch(*flags, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_an_experiment_of_the_tests_is_valid(base_path):
    parse_experiment(experiment(base_path))
