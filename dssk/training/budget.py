"""Training for a number of CPU minutes in place of a number of steps: the same effort on whatever machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

SCHEDULE_STEPS = 10_000  # resolution of a learning-rate schedule over time


class CpuBudget:
    """CPU seconds that a run has used, over all its starts, and how many it may use.

    The clock of this start begins with the object; it counts every thread of this process, but no other process.
    """

    def __init__(self, minutes: float | None = None):
        self.limit = None if minutes is None else 60 * minutes
        self.before = 0.0  # of earlier starts
        self._begin = time.process_time()
        self._paused: float | None = None  # since when

    @property
    def used(self) -> float:
        now = time.process_time() if self._paused is None else self._paused
        return self.before + now - self._begin

    @property
    def share(self) -> float:
        """How much of the limit is used, from 0 to 1; 0 without a limit."""
        return 0.0 if self.limit is None else min(1.0, self.used / self.limit)

    def place(self, step: int, steps: int) -> str:
        """How far a run is that has made `step` of `steps` steps, in words."""
        if self.limit is None:
            return f"{step}/{steps}"
        return f"{step}, {self.used / 60:.1f} of {self.limit / 60:g} CPU minutes"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this block the clock is stopped."""
        self._paused = time.process_time()
        try:
            yield
        finally:
            self._begin += time.process_time() - self._paused
            self._paused = None

    def drive(self, scheduler: Any) -> None:
        """Drive a schedule of `SCHEDULE_STEPS` steps by CPU time; one that depends on the loss is left unchanged."""
        if isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [self._by_time(rate) for rate in scheduler.lr_lambdas]
            for group, rate, base in zip(
                scheduler.optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True
            ):
                group["lr"] = base * rate(0)

    def _by_time(self, rate: Any) -> Any:
        return lambda step: rate(max(1, round(self.share * SCHEDULE_STEPS)))


class BudgetTrainer(Trainer):
    """Trainer whose learning rate follows the time of `budget`, if that has a limit."""

    budget: CpuBudget

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.budget.limit is None:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        scheduler = super().create_scheduler(SCHEDULE_STEPS, *args, **kwargs)
        self.budget.drive(scheduler)
        return scheduler


class StopAtBudget(TrainerCallback):
    """Evaluate, save (where one does) and end in the step after which the CPU seconds are used up."""

    def __init__(self, budget: CpuBudget):
        self.budget = budget

    def on_step_end(self, args, state, control, **kwargs):
        if self.budget.share >= 1:
            control.should_log = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
            control.should_save = args.save_strategy != SaveStrategy.NO
