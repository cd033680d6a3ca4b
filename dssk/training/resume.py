"""Where a run starts: afresh, or at its newest whole checkpoint if that fits what is asked for now."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dssk.checkpoint import checkpoint_step, load_manifest, newest_checkpoint
from dssk.config import ExperimentConfig
from dssk.errors import DsskError
from dssk.training.flags import RunArgs


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    fresh: bool  # what the folder holds is moved aside first
    checkpoint: Path | None
    skipped: list[str]  # newer checkpoints that are not whole, and why
    skip_steps: int  # micro-batches accumulated by each rank
    facts: dict[str, Any]  # what the checkpoints to come were made from

    @property
    def step(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def find_start(savedir: Path, run: RunArgs, cfg: ExperimentConfig, facts: dict[str, Any]) -> Start:
    """Decide it on each rank, before any of them writes. Raises `DsskError` if a checkpoint does not fit.

    A launcher that restarts its ranks resumes, whatever `-r` says: the reset has happened.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if run.reset and not restarted:
        return Start(True, None, [], cfg.skip_steps, facts)
    checkpoint, skipped = newest_checkpoint(savedir)
    if checkpoint is None:
        return Start(False, None, skipped, cfg.skip_steps, facts)
    manifest = load_manifest(checkpoint)
    if changed := differences(manifest["experiment"], facts["experiment"]):
        raise DsskError(f"{checkpoint} is of another experiment: {changed}; -r 1 starts afresh")
    if manifest["data"] != facts["data"]:
        raise DsskError(f"{checkpoint} was trained on other data than {run.data_path}; -r 1 starts afresh")
    return Start(False, checkpoint, skipped, _skip_steps(manifest, cfg), facts)


def _skip_steps(manifest: dict[str, Any], cfg: ExperimentConfig) -> int:
    """Micro-batches for each rank that keep the global batch of the checkpoint."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batches = manifest["world_size"] * manifest["skip_steps"]
    if micro_batches % ranks:
        fitting = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise DsskError(
            f"the run was begun on {manifest['world_size']} ranks, {micro_batches} micro-batches of "
            f"{cfg.train_batch_size} rows a step: {ranks} ranks cannot share them evenly, want {' or '.join(fitting)}"
        )
    return micro_batches // ranks


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys whose values differ, with both values; empty if none does."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)
