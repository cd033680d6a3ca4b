"""Being stopped from outside: a scheduler sends SIGTERM, and all ranks save the same step."""

import signal
from types import FrameType

import torch
from torch import distributed
from transformers import TrainerCallback


class EvaluationStopped(Exception):
    """An evaluation was left for a stop; it is due again after resuming."""


class StopRequest:
    """Whether SIGTERM came, to any rank.

    The handler only notes it; saving happens where the training loop is between two steps. Further SIGTERMs change
    nothing: schedulers and torchrun send several for one stop, and SIGKILL follows if saving takes too long.
    """

    def __init__(self) -> None:
        self.received = False
        self.obeyed_step: int | None = None  # the step that was saved because of it
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
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
            raise EvaluationStopped
