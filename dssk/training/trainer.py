"""transformers' Trainer, with checkpoints of our own: only what trains, nothing pickled, whole or absent."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dssk.checkpoint import checkpoint_folder, rotate, write_checkpoint
from dssk.config import ExperimentConfig
from dssk.errors import Diverged
from dssk.training import state
from dssk.training.best import best_evaluation
from dssk.training.budget import BudgetTrainer, CpuBudget
from dssk.training.distill import Teacher, for_student
from dssk.training.sampler import EpochSampler, shared_contexts, text_lengths
from dssk.training.stopping import LeaveTraining
from dssk.utils.files import write_json

MAX_ROWS_NAMED = 8


class CrossAttnTrainer(BudgetTrainer):
    """Trainer for a `CrossAttnForCausalLM`.

    `facts` go into each checkpoint's manifest. `score_answers` is called in evaluation, on all ranks, and adds to
    the metrics; `best.best_evaluation` says which checkpoint is the best one.

    `train` ends by `LeaveTraining` if an evaluation was stopped; all is saved then.
    """

    def __init__(
        self,
        *args,
        cfg: ExperimentConfig,
        facts: dict[str, Any],
        keep_checkpoints: int,
        score_answers: Callable[[Trainer], dict[str, float]] | None = None,
        budget: CpuBudget | None = None,
        teacher: Teacher | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.cfg = cfg
        self.facts = facts
        self.keep_checkpoints = keep_checkpoints
        self.score_answers = score_answers
        self.budget = budget or CpuBudget()
        self.teacher = teacher
        self.evaluation_due = False  # a stop from outside came in or before an evaluation
        # Of this process, by use.
        self.seconds = dict.fromkeys(("training", "data", "evaluation", "saving"), 0.0)
        self._tokens = 0  # of this rank, padding included, since the last log
        self._logged_seconds = 0.0
        lengths = text_lengths(self.train_dataset) if cfg.group_by_length else None
        together = cfg.questions_per_context
        contexts = shared_contexts(self.train_dataset) if together > 1 else None
        self.sampler = EpochSampler(
            len(self.train_dataset), self.global_batch, cfg.seed, lengths, contexts, together
        )
        self._resumed: Path | None = None  # a checkpoint whose random numbers are still to be put back
        self.add_callback(_Position(self))

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    # --- one step

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        return self.sampler

    def compute_loss(self, model, inputs, *args, **kwargs):
        # Trainer's own smoother does not shift the labels of models it does not know.
        settings: dict[str, Any] = {"smoothing": self.cfg.label_smoothing_factor if model.training else 0.0}
        if self.teacher is not None and model.training:
            settings["soft_targets"] = self.teacher.soft_targets(inputs)
            inputs = for_student(inputs)
        return super().compute_loss(model, {**inputs, **settings, "skip_logits": True}, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        with self._timed("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        with self._timed("training"):
            loss = super().training_step(model, inputs, *args, **kwargs)
            self._watch("loss", loss)
        self._tokens += inputs["input_ids"].numel()
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            seconds = self.seconds["training"] + self.seconds["data"] - self._logged_seconds
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / max(seconds, 1e-9), 1)
            logs["cpu_seconds"] = round(self.budget.used, 1)
            self._logged_seconds += seconds
            self._tokens = 0
        if "train_runtime" in logs:  # the last one
            logs |= {f"{use}_seconds": round(seconds, 3) for use, seconds in self.seconds.items()}
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # fp16's scaler meets infinite gradients and skips such steps.
        if not self.cfg.fp16 and norm is not None:
            self._watch("the gradient's norm", torch.as_tensor(norm))
        return norm

    def _watch(self, what: str, value: torch.Tensor) -> None:
        """Stop at a value that is NaN or infinite."""
        if not torch.isfinite(value):
            step = self.state.global_step + 1
            raise Diverged(
                f"{what} is {value.item()} in step {step}, rows {self._row_ids(step)}: lower the learning rate, or "
                "use bf16 in place of fp16"
            )

    def _row_ids(self, step: int) -> str:
        """The ids of this rank's rows of a step."""
        size, ranks, me = self.args.train_batch_size, self.args.world_size, self.args.process_index
        rows = self.sampler.rows_of_step(step)
        mine = [row for i, row in enumerate(rows) if i // size % ranks == me]
        data: Any = self.train_dataset
        ids = data.rows.with_format(None).select([row % len(data.rows) for row in mine])["id"]
        more = f" and {len(mine) - MAX_ROWS_NAMED} more" if len(mine) > MAX_ROWS_NAMED else ""
        return ", ".join(list(ids)[:MAX_ROWS_NAMED]) + more

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.cfg.adam_moments == "bf16":
            optimizer.register_step_post_hook(state.MomentRounding(self.cfg.seed))
        return optimizer

    # --- evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # Whether and when one evaluates leaves no trace in the random numbers of training.
        try:
            with self._timed("evaluation"), self.budget.paused(), torch.random.fork_rng():
                return super().evaluate(*args, **kwargs)
        except LeaveTraining:
            if not self.evaluation_due:  # else the checkpoint that one resumed from says all there is to say
                self.evaluation_due = True
                self._save_checkpoint(self.model, None)
            raise

    def make_up_evaluation(self) -> None:
        """Make the evaluation that the last start was stopped in."""
        self._evaluate(None, None)
        self.evaluation_due = False
        if self.control.should_training_stop:  # no better than those before it
            self._save_checkpoint(self.model, None)
            raise LeaveTraining

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score_answers is not None:
            scores = self.score_answers(self)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    # --- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        with self._timed("saving"), self.budget.paused():
            self._collect_and_write()

    def _collect_and_write(self) -> None:
        self.store_flos()
        weights, moments = state.gather_weights(self), state.gather_optimizer(self)
        run_state = state.gather_run_state(self)
        if bad := [name for name, tensor in (weights | moments).items() if not tensor.isfinite().all()]:
            raise Diverged(
                f"{bad[0]} is not finite after step {self.state.global_step}: no checkpoint of it is written; lower "
                "the learning rate, or use bf16 in place of fp16"
            )
        if self.args.should_save:
            self._write_checkpoint(weights, moments, run_state)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, weights, moments, run_state) -> None:
        savedir = Path(self.args.output_dir)
        best = self._note_best(savedir)
        num_bytes = sum(tensor.nbytes for tensor in [*weights.values(), *moments.values()])
        folder = checkpoint_folder(savedir, self.state.global_step)
        with write_checkpoint(folder, self._facts(), num_bytes) as write:
            write.model(self.unwrapped_model, self.processing_class, weights)
            write.tensors(state.OPTIMIZER_FILE, moments)
            write_json(folder / state.STATE_FILE, run_state)
            self.state.save_to_json(str(folder / state.TRAINER_STATE_FILE))
        rotate(savedir, self.keep_checkpoints, best)

    def _note_best(self, savedir: Path) -> Path | None:
        """Say in transformers' state which evaluation was the best; returns its checkpoint."""
        best = best_evaluation(self.state.log_history)
        if best is None:
            return None
        folder = checkpoint_folder(savedir, best["step"])
        self.state.best_global_step = best["step"]
        self.state.best_metric = best.get("eval_f1", best["eval_loss"])
        self.state.best_model_checkpoint = str(folder)
        return folder

    def _facts(self) -> dict[str, Any]:
        counts = {"world_size": self.args.world_size, "skip_steps": self.args.gradient_accumulation_steps}
        return {"step": self.state.global_step, **counts, **self.facts}

    @property
    def unwrapped_model(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # --- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Weights are restored with everything else, when all engines have wrapped the model."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._resumed = Path(resume_from_checkpoint)
            state.restore(self, self._resumed)
        return prepared

    def restore_rank(self) -> None:
        """Put back the random numbers and the running loss of a checkpoint, once."""
        if self._resumed is not None:
            state.restore_rank(self, self._resumed)
            self._resumed = None


class _Position(TrainerCallback):
    """Tells the trainer where in its rows it is, and makes up for what the last start was stopped in."""

    def __init__(self, trainer: CrossAttnTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # of this call, not of the checkpoint
        if self.trainer.evaluation_due:
            self.trainer.make_up_evaluation()

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch, step = divmod(state.global_step, self.trainer.sampler.steps_per_epoch)
        self.trainer.sampler.set_epoch(epoch)
        self.trainer.train_dataset.set_epoch(epoch)
        if step == 0:  # what comes next draws random numbers
            self.trainer.restore_rank()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.restore_rank()  # in the middle of an epoch: batches that were trained on have been skipped
