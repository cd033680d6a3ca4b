"""The trainer of a reader: its steps, its losses, its evaluations."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from dssk.checkpoint import Writer
from dssk.config import ExperimentConfig
from dssk.errors import Diverged
from dssk.training import state
from dssk.training.distill import Teacher, for_student
from dssk.training.resumable import ResumableTrainer
from dssk.training.sampler import EpochSampler, shared_contexts, text_lengths
from dssk.training.stopping import LeaveTraining

MAX_ROWS_NAMED = 8


class CrossAttnTrainer(ResumableTrainer):
    """Trainer for a `CrossAttnForCausalLM`.

    `score_answers` is called in evaluation, on all ranks, and adds to the metrics; `best.best_evaluation` says which
    checkpoint is the best one.

    `train` ends by `LeaveTraining` if an evaluation was stopped; all is saved then.
    """

    sampler: EpochSampler

    def __init__(
        self,
        *args,
        cfg: ExperimentConfig,
        score_answers: Callable[[Trainer], dict[str, float]] | None = None,
        teacher: Teacher | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.cfg = cfg
        self.score_answers = score_answers
        self.teacher = teacher
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
        self.add_callback(_MakeUp(self))

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    # --- one step

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
        ended = self.state.global_step >= self.state.max_steps or self.budget.share >= 1
        if ended or self.control.should_training_stop:  # no better than those before it
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
        with self._timed("saving"):
            super()._save_checkpoint(model, trial)

    def write_model(self, write: Writer, weights: state.Tensors) -> None:
        write.model(self.unwrapped_model, self.processing_class, weights)


class _MakeUp(TrainerCallback):
    """Makes up for the evaluation that the last start was stopped in."""

    def __init__(self, trainer: CrossAttnTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.evaluation_due:
            self.trainer.make_up_evaluation()
