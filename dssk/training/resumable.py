"""transformers' Trainer, with checkpoints of our own: only what trains, nothing pickled, whole or absent."""

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from dssk.checkpoint import WEIGHTS_FILE, Writer, checkpoint_folder, rotate, write_checkpoint
from dssk.errors import Diverged
from dssk.training import state
from dssk.training.best import best_evaluation
from dssk.training.budget import BudgetTrainer, CpuBudget
from dssk.training.sampler import EpochSampler
from dssk.utils.files import write_json


class ResumableTrainer(BudgetTrainer):
    """Trainer that saves into `args.output_dir`, and goes on from there as if it had never stopped.

    `facts` go into each checkpoint's manifest. Without a `sampler` rows come as transformers orders them, and a run
    that goes on has the rest of its epoch in another order.
    """

    sampler: EpochSampler | None = None

    def __init__(
        self,
        *args: Any,
        facts: dict[str, Any],
        keep_checkpoints: int = 1,
        budget: CpuBudget | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.facts = facts
        self.keep_checkpoints = keep_checkpoints
        self.budget = budget or CpuBudget()
        self.evaluation_due = False  # a stop from outside came in or before an evaluation
        self.add_callback(_Position(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    # --- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.budget.paused():
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

    def _write_checkpoint(
        self, weights: state.Tensors, moments: state.Tensors, run_state: dict[str, Any]
    ) -> None:
        savedir = Path(str(self.args.output_dir))
        best = self._note_best(savedir)
        num_bytes = sum(tensor.nbytes for tensor in [*weights.values(), *moments.values()])
        folder = checkpoint_folder(savedir, self.state.global_step)
        with write_checkpoint(folder, self._facts(), num_bytes) as write:
            self.write_model(write, weights)
            write.tensors(state.OPTIMIZER_FILE, moments)
            write_json(folder / state.STATE_FILE, run_state)
            self.state.save_to_json(str(folder / state.TRAINER_STATE_FILE))
        rotate(savedir, self.keep_checkpoints, best)

    def write_model(self, write: Writer, weights: state.Tensors) -> None:
        """Write what is kept of the model."""
        write.tensors(WEIGHTS_FILE, weights)

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
    def unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # --- resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are restored with everything else, when all engines have wrapped the model."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            state.restore(self, Path(resume_from_checkpoint))
        return prepared

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Put back random numbers and running loss, after the batches that were trained on have been skipped."""
        state.restore_rank(self, Path(checkpoint))


class _Position(TrainerCallback):
    """Tells sampler and data set of a trainer which epoch it is in."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # of this call, not of the checkpoint

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.sampler is None:
            return
        epoch = state.global_step // self.trainer.sampler.steps_per_epoch
        self.trainer.sampler.set_epoch(epoch)
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(epoch)


class SaveEvery(TrainerCallback):
    """Saves in the step after so many seconds by the clock since training began, or was saved."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= time.monotonic() - self._last >= self.seconds

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
