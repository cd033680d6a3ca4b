"""Stopped anywhere and started again: nothing changes, nothing damaged is used, nothing is lost."""

import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dssk import checkpoint
from dssk.checkpoint import latest_checkpoint, load_manifest, newest_checkpoint, rotate
from dssk.config import parse_experiment
from dssk.errors import DamagedData, DsskError, Locked
from dssk.inference.fingerprint import model_fingerprint
from dssk.inference.loading import load_base_config
from dssk.store import verify as verify_module
from dssk.training.resume import find_start
from dssk.training.sampler import EpochSampler
from dssk.training.state import random_state, set_random_state
from dssk.utils.files import lock
from tests.conftest import experiment
from tests.faults.mutations import reseal_checkpoint
from tests.training.conftest import equal_tensors, logged, losses, on_ranks

STEPS = ("--steps", "7", "--log_every", "1")


def cut_after(folder, step: int) -> None:
    """As a kill after `step` leaves a run; what was logged later has been logged, and its last line torn."""
    for path in folder.glob("checkpoint-*"):
        if checkpoint.checkpoint_step(path) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({}, 0),
        ({"skip_steps": 4}, 2),
        ({"include_context_ids": True, "do_repetition_augmentations": True, "train_batch_size": 16}, 0),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "adam_moments": "fp32"}, 0),
        ({"num_contexts": 3, "distractors": {"batch": 1.0}}, 2),
    ],
    ids=str,
)
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(run, monkeypatch, changes, workers):
    # 36 training questions: with 16 rows a step an epoch ends after 2 steps or, with the contexts, after 4.
    monkeypatch.setattr("dssk.training.arguments.loader_workers", lambda: workers)
    monkeypatch.setattr("torch.utils.data._utils.worker.torch.set_num_threads", lambda n: None)
    whole = run(*STEPS, **changes)
    kept = whole.rename(whole.with_name("whole"))
    for step in (1, 2, 4):
        shutil.copytree(kept, whole)
        cut_after(whole, step)
        assert run(*STEPS, **changes) == whole
        assert_equal_runs(whole, kept)
        shutil.rmtree(whole)


def assert_equal_runs(one, other) -> None:
    """Weights, moments, random numbers, losses and evaluations of two runs are equal bit for bit."""
    last = latest_checkpoint(one).name
    assert equal_tensors(one / "final", other / "final")
    assert equal_tensors(one / last, other / last, "optimizer.safetensors")
    assert (one / last / "training_state.json").read_text() == (
        other / last / "training_state.json"
    ).read_text()
    assert losses(one) == losses(other)
    evaluations = [[e["eval_loss"] for e in logged(f) if "eval_loss" in e] for f in (one, other)]
    assert evaluations[0] == evaluations[1]


def test_a_run_that_is_done_says_so_and_is_left_as_it_is(run, capsys, monkeypatch):
    folder = run("--steps", "2", "--log_every", "1")
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*/*")}
    capsys.readouterr()
    monkeypatch.setattr("dssk.training.run.build_trainer", None)  # nothing is loaded for it
    run("--steps", "2", "--log_every", "1")
    said = capsys.readouterr().out
    assert "finished: step 2 of 2; more --steps go on from there, -r 1 starts afresh" in said
    assert "resuming" not in said
    assert {f: f.stat().st_mtime_ns for f in folder.glob("*/*")} == before
    shutil.rmtree(folder / "final")
    run("--steps", "2", "--log_every", "1")
    assert (folder / "final" / "model.safetensors").exists()
    file = folder / "final" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # what is damaged is made again
    run("--steps", "2", "--log_every", "1")
    assert file.read_bytes() == whole


def test_more_steps_go_on_from_the_end_with_other_log_steps(run):
    folder = run("--steps", "2", "--log_every", "1")
    run("--steps", "6", "--log_every", "2")
    assert list(losses(folder)) == [1, 2, 4, 6]


# Damage


def test_a_damaged_checkpoint_is_skipped_saying_why_and_the_one_before_is_used(run, capsys):
    folder = run("--steps", "3", "--log_every", "1")
    (folder / "checkpoint-3" / "dssk_manifest.json").unlink()
    (folder / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"cut")
    assert latest_checkpoint(folder) == folder / "checkpoint-1"
    run("--steps", "3", "--log_every", "1")
    said = capsys.readouterr().out
    assert "checkpoint-3 is unfinished" in said
    assert "optimizer.safetensors has 3 bytes, not" in said
    assert "resuming from step 1" in said
    assert newest_checkpoint(folder) == (folder / "checkpoint-3", [])


def test_when_all_checkpoints_are_damaged_nothing_starts_afresh_silently(run):
    folder = run("--steps", "1", "--log_every", "1")
    (folder / "checkpoint-1" / "model.safetensors").unlink()
    with pytest.raises(DamagedData, match="model.safetensors is missing.*start afresh with -r 1"):
        run("--steps", "1", "--log_every", "1")


def test_every_flipped_bit_and_every_cut_in_a_checkpoint_is_found(run):
    folder = run("--steps", "1", "--log_every", "1") / "checkpoint-1"
    checkpoint.verify_checkpoint(folder)
    rng = random.Random(0)
    files = [f for f in sorted(folder.iterdir()) if f.stat().st_size]
    for number in range(40):
        file = files[number % len(files)]
        whole = file.read_bytes()
        position = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped if number % 3 else whole[:position])
        with pytest.raises((DamagedData, DsskError)):
            checkpoint.verify_checkpoint(folder)
        file.write_bytes(whole)
    checkpoint.verify_checkpoint(folder)


def test_rotation_goes_by_step_keeps_the_best_and_never_asks_the_clock(run):
    folder = run("--steps", "6", "--log_every", "1")
    for number, path in enumerate(sorted(folder.glob("checkpoint-*"), reverse=True)):
        os.utime(path, (number, number))
    rotate(folder, 2, folder / "checkpoint-3")
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5", "checkpoint-6"}


def test_a_run_keeps_as_many_checkpoints_as_asked_and_the_best(run):
    folder = run("--steps", "6", "--log_every", "1", "--save_total_limit", "1", learning_rate=1e-2)
    best = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"]
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-6", f"checkpoint-{best}"}


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(run, monkeypatch):
    folder = run("--steps", "1", "--log_every", "1")
    monkeypatch.setattr(
        "dssk.utils.files.shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard(folder / "checkpoint-1")
    assert latest_checkpoint(folder) is None
    assert (folder / "checkpoint-1" / "model.safetensors").exists()


# What does not fit


def test_another_experiment_in_the_same_folder_is_refused_with_the_difference(run):
    folder = run("--steps", "1", "--log_every", "1")
    other = run("--steps", "1", "--log_every", "1", learning_rate=0.1)
    shutil.rmtree(other / "checkpoint-1")
    shutil.copytree(folder / "checkpoint-1", other / "checkpoint-1")
    with pytest.raises(DsskError, match="another experiment: learning_rate was 0.0006, is 0.1; -r 1"):
        run("--steps", "2", "--log_every", "1", learning_rate=0.1)
    stored = json.loads((other / "exp_dict.json").read_text()) | {"seed": "0"}
    (other / "exp_dict.json").write_text(json.dumps(stored))
    shutil.rmtree(other / "checkpoint-1")
    with pytest.raises(DsskError, match="another experiment: seed was '0', is 0"):
        run("--steps", "2", "--log_every", "1", learning_rate=0.1)


def test_other_data_is_refused(run, base_path, tmp_path):
    from tests.conftest import encode_rows, question_rows

    run("--steps", "1", "--log_every", "1")
    other = encode_rows(base_path, tmp_path, question_rows(24))
    with pytest.raises(DsskError, match="was trained on other data"):
        run("--steps", "2", "--log_every", "1", data_path=other)


def test_ranks_that_cannot_share_the_global_batch_are_refused(run, base_path, monkeypatch):
    folder = run("--steps", "1", "--log_every", "1", skip_steps=4)
    cfg = parse_experiment(experiment(base_path, skip_steps=4))
    facts = load_manifest(folder / "checkpoint-1")
    args = SimpleNamespace(reset=False, steps=2, minutes=None, data_path="data")
    assert find_start(folder, args, cfg, facts).skip_steps == 4
    monkeypatch.setattr("dssk.training.resume.launched", lambda: 3)
    with pytest.raises(DsskError, match="3 ranks cannot share them evenly, want 1 or 2 or 4"):
        find_start(folder, args, cfg, facts)


def test_a_base_that_was_replaced_since_is_refused(run, base_path):
    folder = run("--steps", "1", "--log_every", "1")
    facts = load_manifest(folder / "checkpoint-1")
    assert facts["base_fingerprint"] == model_fingerprint(base_path, load_base_config(base_path))
    args = SimpleNamespace(reset=False, steps=2, minutes=None, data_path="data")
    cfg = parse_experiment(experiment(base_path))
    with pytest.raises(DsskError, match="was trained on another base: the weights of .* have changed since"):
        find_start(folder, args, cfg, facts | {"base_fingerprint": "2:0"})


def test_where_to_start_is_decided_under_the_lock(run, monkeypatch):
    """A run that ends while another one verifies its data must not leave that one with a stale start."""
    folder = run("--steps", "1", "--log_every", "1")
    verify, seen = verify_module.check, []

    def check(*args):
        if not seen:
            seen.append("first")
            with pytest.raises(Locked):
                run("--steps", "3", "--log_every", "1", "--save_total_limit", "1")
        return verify(*args)

    monkeypatch.setattr("dssk.training.run.verify.check", check)
    run("--steps", "2", "--log_every", "1")
    assert seen
    assert latest_checkpoint(folder) == folder / "checkpoint-2"


def test_a_damaged_metrics_file_stops_no_resume(run, capsys):
    folder = run("--steps", "2", "--log_every", "1")
    whole = (folder / "metrics.jsonl").read_bytes()
    damage = [b"\xff\xfe", b'{"loss": 1.0}', b"[1, 2]", b"5", b'{"step": null}', b"[" * 100_000]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*damage, whole]) + b'{"step": 3, "lo')
    run("--steps", "3", "--log_every", "1")
    assert f"7 damaged lines of {folder / 'metrics.jsonl'} are dropped" in capsys.readouterr().err
    assert list(losses(folder)) == [1, 2, 3]


def test_a_second_run_in_one_folder_stops_at_once_and_names_the_first(run):
    folder = run("--steps", "1", "--log_every", "1")
    with (
        lock(folder.with_name(f".{folder.name}.lock")),
        pytest.raises(Locked, match=f'"pid": {os.getpid()}'),
    ):
        run("--steps", "2", "--log_every", "1")
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_reset_moves_the_old_run_aside_and_starts_afresh(run, tmp_path):
    first = run("--steps", "2", "--log_every", "1")
    (first / "mark").touch()
    for times in (1, 2, 3):
        run("--steps", "1", "--log_every", "1", "-r", "1")
        assert not (first / "mark").exists()
        assert {f.name for f in first.glob("checkpoint-*")} == {"checkpoint-1"}
        assert len(list((tmp_path / "deleted").iterdir())) == times


def test_a_launcher_that_restarts_its_ranks_resumes_in_spite_of_reset(run, monkeypatch, capsys):
    run("--steps", "1", "--log_every", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("--steps", "2", "--log_every", "1", "-r", "1")
    assert "resuming from step 1" in capsys.readouterr().out


def test_other_numbers_of_ranks_go_on_with_the_same_batches(run, tmp_path):
    changes = {"skip_steps": 2, "cross_attn_dropout_prob": 0.0, "include_context_ids": True}
    changes |= {"num_contexts": 2, "distractors": {"batch": 1.0}}
    flags = ("--log_every", "2", "--generation_eval_samples", "5")
    elastic = run("--steps", "2", *flags, **changes)
    assert on_ranks(2, lambda: run("--steps", "6", *flags, **changes) and 0) == [0, 0]
    run("--steps", "8", *flags, **changes)
    elastic = elastic.rename(tmp_path / "elastic")
    plain = run("--steps", "2", *flags, **changes)
    for steps in ("6", "8"):
        run("--steps", steps, *flags, **changes)
    assert losses(elastic) == pytest.approx(losses(plain), abs=1e-6)
    for name in ("eval_f1", "eval_em", "eval_wrong_context_f1"):
        scores = [[entry[name] for entry in logged(f) if name in entry] for f in (elastic, plain)]
        assert len(scores[0]) == 4
        assert scores[0] == scores[1]


def test_two_ranks_resume_bit_for_bit(run):
    changes = {"skip_steps": 2, "group_by_length": False}
    (folder,) = {run("--steps", "1", "--log_every", "1", **changes)}
    shutil.rmtree(folder)
    assert on_ranks(2, lambda: run(*STEPS, **changes) and 0) == [0, 0]
    kept = folder.rename(folder.with_name("whole"))
    shutil.copytree(kept, folder)
    cut_after(folder, 3)
    assert on_ranks(2, lambda: run(*STEPS, **changes) and 0) == [0, 0]
    assert_equal_runs(folder, kept)


# The pieces


@pytest.mark.parametrize("grouped", [False, True])
def test_the_rows_of_a_step_are_decided_by_seed_and_step_alone(grouped):
    drawn = np.random.default_rng(0).integers(1, 1000, 103)
    lengths = (lambda epoch: drawn) if grouped else None
    sampler = EpochSampler(103, 8, 0, lengths)
    sampler.set_epoch(2)
    order = list(sampler)
    assert len(order) == len(set(order)) == 96
    assert sampler.rows_of_step(2 * 12 + 1) == order[:8]
    assert list(EpochSampler(103, 8, 0, lengths)) != order
    assert EpochSampler(103, 8, 1, lengths).rows_of_step(25) != order[:8]
    assert len(list(EpochSampler(3, 8, 0))) == 8


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 1000, 800)
    grouped, plain = EpochSampler(800, 8, 0, lambda epoch: lengths).order(0), EpochSampler(800, 8, 0).order(0)
    assert lengths[grouped].max(axis=1).sum() < 0.7 * lengths[plain].max(axis=1).sum()
    assert not np.array_equal(np.sort(lengths[grouped[:, 0]])[::-1], lengths[grouped[:, 0]])


def test_rows_of_one_context_lie_together_and_those_of_rare_ones_make_steps_of_their_own():
    contexts = np.repeat(np.arange(30), [1] * 10 + [3] * 5 + [4] * 5 + [9] * 10)
    lengths = np.random.default_rng(0).integers(1, 1000, 30)[contexts]
    sampler = EpochSampler(len(contexts), 8, 0, lambda epoch: lengths, contexts, together=4)
    assert sampler.steps_per_epoch == 25 // 2 + 25 // 8 == len(sampler) / 8
    first, second = sampler.order(0), sampler.order(1)
    for step in first:
        numbers = contexts[step]
        groups = numbers.reshape(-1, 4)
        assert (numbers < 15).all() or ((groups == groups[:, :1]).all() and (groups >= 15).all())
        assert len(set(step.tolist())) == 8
    assert set(first.ravel().tolist()) != set(
        second.ravel().tolist()
    )  # what was beyond a multiple comes, too
    assert np.array_equal(
        EpochSampler(120, 8, 0, None, np.zeros(120, int)).order(3), EpochSampler(120, 8, 0).order(3)
    )
    assert len(list(EpochSampler(3, 8, 0, None, np.zeros(3, int), together=4))) == 8
    few = np.repeat(np.arange(4), [4, 4, 1, 1])  # two rows alone fill no step
    assert sorted(EpochSampler(10, 8, 0, lambda epoch: lengths[:10], few, together=4)) == list(range(8))


def test_random_states_survive_json():
    draws = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1))  # noqa: E731
    draws()
    state = json.loads(json.dumps(random_state()))
    first = draws()
    set_random_state(state)
    assert draws() == first


def test_a_learning_rate_that_is_no_number_is_damage(run):
    checkpoint = run("--steps", "2", "--log_every", "2") / "checkpoint-2"
    file = checkpoint / "training_state.json"
    saved = json.loads(file.read_text())
    saved["scheduler"]["base_lrs"][-1] = "NaN"
    file.write_text(json.dumps(saved))
    reseal_checkpoint(checkpoint)
    with pytest.raises(DamagedData, match="learning rates are"):
        run("--steps", "3", "--log_every", "3")
