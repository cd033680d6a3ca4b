"""Latency of generated tokens."""

import time

import torch
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Times the tokens that `generate` streams to it, in seconds since the clock was made."""

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is synchronized at each token if it is a GPU."""
        self._device = device
        self._start = time.perf_counter()
        self.seconds: list[float] = []  # of the prompt, then of each new token

    def put(self, value: torch.Tensor) -> None:
        wait_for(self._device)
        self.seconds.append(time.perf_counter() - self._start)

    def end(self) -> None:
        pass

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.seconds) - 1

    @property
    def first_token(self) -> float:
        """Seconds to the first new token."""
        return self.seconds[1]

    @property
    def last_token(self) -> float:
        """Seconds to the last one."""
        return self.seconds[-1]

    @property
    def tokens_per_second(self) -> float:
        """The rate of those after the first."""
        return (self.num_tokens - 1) / (self.last_token - self.first_token)


def wait_for(device: torch.device | None) -> None:
    """Wait until a GPU has finished its queued work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
