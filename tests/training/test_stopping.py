"""Every way a run can end: stopped from outside, diverged, failed, done. `status.json` says which."""

import itertools
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dssk.checkpoint import checkpoint_step, latest_checkpoint
from dssk.errors import Diverged, DsskError, EnvironmentFault, Preempted
from dssk.training.state import load_run_state
from dssk.training.stopping import LeaveTraining
from dssk.training.trainer import CrossAttnTrainer
from tests.training.conftest import equal_tensors, logged, losses, on_ranks

STEPS = ("--steps", "6", "--log_every", "2")


def status(folder) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def at(monkeypatch):
    """Do something in a method of the trainer when a step is reached."""

    def at(method: str, step: int, action) -> None:
        original = getattr(CrossAttnTrainer, method)

        def changed(self, *args, **kwargs):
            if self.state.global_step == step:
                action(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(CrossAttnTrainer, method, changed)

    return at


def terminate(trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it


@pytest.mark.parametrize(
    ("method", "step", "saved"),
    [
        ("get_train_dataloader", 0, 1),
        ("training_step", 2, 3),
        ("prediction_step", 4, 4),
        ("_save_checkpoint", 2, 3),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    run, monkeypatch, at, tmp_path, method, step, saved
):
    whole = run(*STEPS, "--generation_eval_samples", "4").rename(tmp_path / "whole")
    with monkeypatch.context():
        at(method, step, terminate)
        with pytest.raises(Preempted, match=f"stopped at step {saved}, saved") as caught:
            run(*STEPS, "--generation_eval_samples", "4")
    monkeypatch.undo()
    assert caught.value.exit_code == 75
    (folder,) = (f.parent for f in tmp_path.glob("*/status.json") if f.parent != whole)
    assert latest_checkpoint(folder) == folder / f"checkpoint-{saved}"
    assert (status(folder)["state"], status(folder)["code"]) == ("preempted", 75)
    run(*STEPS, "--generation_eval_samples", "4")
    assert status(folder)["state"] == "done"
    assert equal_tensors(folder / "final", whole / "final")
    assert losses(folder) == losses(whole)
    for name in ("eval_loss", "eval_f1"):
        first, second = ([(e["step"], e[name]) for e in logged(f) if name in e] for f in (folder, whole))
        assert first == second
    best = [load_state(f)["best_global_step"] for f in (folder, whole)]
    assert best[0] == best[1]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_in_an_evaluation_that_is_made_up_for_loses_nothing(run, monkeypatch, at, tmp_path):
    flags = (*STEPS, "--generation_eval_samples", "4")
    whole = run(*flags).rename(tmp_path / "whole")
    for _ in range(2):
        with monkeypatch.context() as patch:
            at_four = CrossAttnTrainer.prediction_step

            def stop_at_four(self, *args, original=at_four, **kwargs):
                if self.state.global_step == 4:
                    terminate(self)
                return original(self, *args, **kwargs)

            patch.setattr(CrossAttnTrainer, "prediction_step", stop_at_four)
            with pytest.raises(Preempted, match="stopped at step 4, saved"):
                run(*flags)
    folder = run(*flags)
    assert equal_tensors(folder / "final", whole / "final")
    assert losses(folder) == losses(whole)
    assert [e["step"] for e in logged(folder) if "eval_loss" in e] == [2, 4, 6]


def load_state(folder) -> dict:
    return json.loads((latest_checkpoint(folder) / "trainer_state.json").read_text())


def test_ctrl_c_saves_and_says_how_to_go_on(run, monkeypatch, at, capfd):
    monkeypatch.setattr("sys.argv", ["/x/trainval.py", "-e", "a group", "-r", "1", "--steps=6", "--reset=1"])
    at("training_step", 2, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Preempted) as caught:
        run(*STEPS)
    assert str(caught.value) == (
        "stopped at step 3, saved: python trainval.py -e 'a group' --steps=6 goes on from there"
    )
    assert caught.value.exit_code == 75
    assert "saving after this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once_and_what_was_saved_stays(run, at, tmp_path):
    def press_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at("training_step", 3, press_twice)
    with pytest.raises(KeyboardInterrupt):
        run("--steps", "6", "--log_every", "1")
    (folder,) = (f.parent for f in tmp_path.glob("*/status.json"))
    assert (status(folder)["state"], status(folder)["code"]) == ("preempted", 130)
    assert latest_checkpoint(folder).name == "checkpoint-3"


def test_a_launcher_repeats_ctrl_c_which_changes_nothing(run, at, monkeypatch):
    monkeypatch.setattr("dssk.training.stopping.launched", lambda: 2)
    at("training_step", 2, lambda trainer: [os.kill(os.getpid(), signal.SIGINT) for _ in range(3)])
    with pytest.raises(Preempted, match="stopped at step 3, saved: the same command goes on from there"):
        run(*STEPS)


def test_early_stopping_saves_ends_and_stays_ended(run, monkeypatch, capsys):
    scores = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.45, 5: 0.9}
    monkeypatch.setattr(
        "dssk.training.answers.AnswerScorer.__call__", lambda self, t: {"f1": scores[t.state.global_step]}
    )
    flags = ("--steps", "9", "--log_every", "1", "--generation_eval_samples", "4", "--save_fused", "best")
    changes = {"early_stopping_patience": 2, "learning_rate": 1e-9}  # the loss stays: F1 decides
    folder = run(*flags, **changes)
    assert latest_checkpoint(folder).name == "checkpoint-4"
    assert status(folder)["state"] == "done"
    assert json.loads((folder / "best" / "dssk_manifest.json").read_text())["step"] == 2
    capsys.readouterr()
    run(*flags, **changes)
    assert "finished: stopped early at step 4, after 2 evaluations" in capsys.readouterr().out
    assert latest_checkpoint(folder).name == "checkpoint-4"


def test_an_evaluation_that_is_made_up_for_can_end_the_run(run, monkeypatch, at):
    scores = {1: 0.5, 2: 0.2, 3: 0.1}
    flags = ("--steps", "9", "--log_every", "1", "--generation_eval_samples", "4")
    changes = {"early_stopping_patience": 2, "learning_rate": 1e-9}

    def score(scorer, trainer):
        if trainer.state.global_step == 3 and not stopped:
            stopped.append(True)
            raise LeaveTraining
        return {"f1": scores[trainer.state.global_step]}

    stopped: list[bool] = []
    monkeypatch.setattr("dssk.training.answers.AnswerScorer.__call__", score)
    run(*flags, **changes)  # left in the third evaluation
    folder = run(*flags, **changes)
    assert latest_checkpoint(folder).name == "checkpoint-3"
    assert [e["step"] for e in logged(folder) if "eval_loss" in e] == [1, 2, 3]
    assert not json.loads((folder / "checkpoint-3" / "training_state.json").read_text())["evaluation_due"]


def test_a_signal_to_one_rank_stops_all_ranks_at_one_step(run, at):
    folder = run("--steps", "1", "--log_every", "1")
    at("training_step", 3, lambda trainer: trainer.args.process_index == 1 and terminate(trainer))
    codes = on_ranks(2, lambda: run("--steps", "9", "--log_every", "1", "-r", "1") and 0)
    assert codes == [75, 75]
    assert latest_checkpoint(folder).name == "checkpoint-4"
    assert status(folder)["state"] == "preempted"


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_not_finite_are_not_saved(run, at, tmp_path, moment):
    def poison(trainer):
        state = next(iter(trainer.optimizer.state.values()))
        state[moment].view(-1)[0] = float("nan")

    at("_save_checkpoint", 3, poison)
    with pytest.raises(
        Diverged, match=f"{moment}.* is not finite after step 3: no checkpoint of it is written"
    ):
        run("--steps", "6", "--log_every", "1")
    (folder,) = (f.parent for f in tmp_path.glob("*/status.json"))
    assert latest_checkpoint(folder).name == "checkpoint-2"


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_run_that_diverges_names_step_and_rows_and_publishes_no_nan(run, at, monkeypatch, what):
    def poison(trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        if what == "gradient":
            parameter.register_hook(lambda grad: grad * float("inf"))
        else:
            parameter.data.fill_(float("nan"))

    at("_save_checkpoint" if what == "weights" else "training_step", 3, poison)
    with pytest.raises(Diverged) as caught:
        run("--steps", "6", "--log_every", "1")
    assert caught.value.exit_code == 5
    if what == "weights":
        assert "is not finite after step 3: no checkpoint of it is written" in str(caught.value)
    else:
        assert "in step 4, rows " in str(caught.value)
        rows = str(caught.value).split("rows ")[1].split(":")[0].split(", ")
        assert len({int(row) for row in rows}) == 4


def test_a_divergence_leaves_finite_checkpoints_only(run, at, tmp_path):
    at("training_step", 3, lambda t: t.model.transformer.cross_attn[0].ln_1.weight.data.fill_(float("nan")))
    with pytest.raises(Diverged):
        run("--steps", "6", "--log_every", "1")
    (folder,) = (f.parent for f in tmp_path.glob("*/status.json"))
    assert latest_checkpoint(folder).name == "checkpoint-3"
    for path in folder.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert (status(folder)["state"], status(folder)["code"]) == ("failed", 5)


def test_a_loss_of_infinity_is_caught_where_it_arises(run, monkeypatch):
    monkeypatch.setattr(
        "transformers.Trainer.training_step", lambda *args, **kwargs: torch.tensor(float("inf"))
    )
    with pytest.raises(Diverged, match="loss is inf in step 1, rows "):
        run("--steps", "1", "--log_every", "1")


def test_a_loss_that_is_no_number_is_logged_as_it_is(run, monkeypatch):
    """Should it ever pass what stops at one: not as zero."""
    monkeypatch.setattr("dssk.training.trainer.CrossAttnTrainer._watch", lambda *args: None)
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *args, **kwargs: torch.tensor(torch.nan))
    folder = run("--steps", "1", "--log_every", "1")
    (loss,) = losses(folder).values()
    assert math.isnan(loss)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(run, monkeypatch, tmp_path):
    folder = run("--steps", "2", "--log_every", "1")
    monkeypatch.setattr("dssk.utils.files.shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(EnvironmentFault, match="disk full at .*checkpoint-3 needs 203.. kB, 1.0 kB free"):
        run("--steps", "3", "--log_every", "1")
    assert latest_checkpoint(folder) == folder / "checkpoint-2"
    assert not (folder / "checkpoint-3").exists()
    assert (status(folder)["state"], status(folder)["code"]) == ("failed", 3)


def test_a_disk_that_fills_while_saving_leaves_nothing_half_written(run, monkeypatch):
    folder = run("--steps", "1", "--log_every", "1")

    def full(*args, **kwargs):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(EnvironmentFault, match="disk full at .*checkpoint-2"):
        run("--steps", "2", "--log_every", "1")
    assert not (folder / "checkpoint-2").exists()


def test_our_own_bug_is_reported_with_code_1(run, at, tmp_path):
    def crash(trainer):
        raise ZeroDivisionError("a bug")

    at("training_step", 0, crash)
    with pytest.raises(ZeroDivisionError):
        run("--steps", "1", "--log_every", "1")
    (folder,) = (f.parent for f in tmp_path.glob("*/status.json"))
    assert (status(folder)["state"], status(folder)["code"]) == ("failed", 1)
    assert "a bug" in status(folder)["reason"]


@pytest.fixture
def ticking(monkeypatch):
    """A CPU clock that moves by a second whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr("dssk.training.budget.time", SimpleNamespace(process_time=lambda: float(next(ticks))))


def test_minutes_end_a_run_with_the_rate_come_down_and_more_of_them_go_on(run, ticking, capsys):
    changes = {"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "learning_rate": 1e-3}
    folder = run("--steps", "1000", "--minutes", "0.5", "--log_every", "1", **changes)
    rates = [entry["learning_rate"] for entry in logged(folder) if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    assert 5e-4 < rates[0] <= 1e-3
    assert rates[-1] < 3e-4
    last = checkpoint_step(latest_checkpoint(folder))
    assert 3 < last < 30
    assert logged(folder)[-1]["step"] == last
    assert "eval_loss" in [entry for entry in logged(folder) if entry["step"] == last][1]
    capsys.readouterr()
    run("--steps", "1000", "--minutes", "0.5", **changes)
    assert re.search(rf"finished: step {last}, 0\.[56] CPU minutes of 0\.5", capsys.readouterr().out)
    run("--steps", "1000", "--minutes", "1", "--log_every", "1", **changes)
    assert 1.4 * last < checkpoint_step(latest_checkpoint(folder)) < 2.6 * last


def test_minutes_count_what_was_used_before_a_start_by_steps(run, ticking):
    folder = run("--steps", "1000", "--minutes", "0.5")
    used = load_run_state(latest_checkpoint(folder))["cpu_seconds"]
    run("--steps", str(checkpoint_step(latest_checkpoint(folder)) + 2))
    assert load_run_state(latest_checkpoint(folder))["cpu_seconds"] > used


def test_an_evaluation_after_the_last_step_is_made_up_for(run, monkeypatch):
    flags = ("--steps", "2", "--log_every", "1", "--generation_eval_samples", "4")

    def score(scorer, trainer):
        if trainer.state.global_step == 2 and not stopped:
            stopped.append(True)
            raise LeaveTraining
        return {"f1": 0.5}

    stopped: list[bool] = []
    monkeypatch.setattr("dssk.training.answers.AnswerScorer.__call__", score)
    run(*flags)  # left in the last evaluation
    folder = run(*flags)
    assert latest_checkpoint(folder).name == "checkpoint-2"
    assert [e["step"] for e in logged(folder) if "eval_loss" in e] == [1, 2]
    assert not load_run_state(latest_checkpoint(folder))["evaluation_due"]


def test_minutes_of_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setattr("dssk.training.run.launched", lambda: 2)
    with pytest.raises(DsskError, match="--minutes counts the CPU of one process"):
        run("--minutes", "1")
