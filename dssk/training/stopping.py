"""Being stopped: by a scheduler's SIGTERM, by Ctrl-C, or by evaluations that get no better."""

import os
import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from dssk.training.best import is_exhausted
from dssk.utils.ranks import launched

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STDERR = 2
NOTICE = b"dssk: saving after this step; Ctrl-C again leaves at once\n"


class LeaveTraining(Exception):
    """Training is left within an evaluation; all is saved, and what is missing of it is due after resuming."""


class StopRequest:
    """Whether SIGTERM or SIGINT (Ctrl-C) came, to any rank.

    The handler only notes it; saving happens where the training loop is between two steps. Further SIGTERMs change
    nothing: schedulers and torchrun send several for one stop, and SIGKILL follows if saving takes too long. A second
    Ctrl-C in a process without a launcher leaves at once: there only a person sends it twice.
    """

    def __init__(self) -> None:
        self.received = False
        self.obeyed_step: int | None = None  # the step that was saved because of it
        self._group: distributed.ProcessGroup | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and launched() == 1:
            if self.received:
                raise KeyboardInterrupt
            os.write(STDERR, NOTICE)  # print may be interrupted by this very call
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank received it; all ranks ask together and get one answer."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return self.received
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")  # on the CPU: no wait for the GPU's queue
        flag = torch.tensor(int(self.received))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)


class StopOnSignal(TrainerCallback):
    """Save and end at the step in which a stop was requested; leave an evaluation for it, to be made up for later."""

    def __init__(self, request: StopRequest):
        self.request = request

    def on_step_end(self, args, state, control, **kwargs):
        if self.request.agreed():
            self.request.obeyed_step = state.global_step
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.request.agreed():
            self.request.obeyed_step = state.global_step
            raise LeaveTraining


class StopEarly(TrainerCallback):
    """End once `patience` evaluations in a row were no better than the best before them; its checkpoint is saved."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args, state, control, **kwargs):
        if is_exhausted(state.log_history, self.patience):
            control.should_training_stop = True
