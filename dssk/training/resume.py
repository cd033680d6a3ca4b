"""Where a run starts: from the beginning, or from its newest whole checkpoint if that fits the flags and the data."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dssk.checkpoint import MANIFEST, checkpoint_step, load_manifest, newest_checkpoint
from dssk.config import ExperimentConfig
from dssk.errors import DamagedData, DsskError
from dssk.run_folder import differences
from dssk.training.best import is_exhausted
from dssk.training.flags import RunArgs
from dssk.training.state import load_run_state, load_trainer_state
from dssk.utils.ranks import launched

FACTS = ("step", "experiment", "data", "world_size", "skip_steps")  # of a checkpoint, besides its files


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    fresh: bool  # what the folder holds is moved aside first
    checkpoint: Path | None
    skipped: list[str]  # newer checkpoints that are not whole, and why
    skip_steps: int  # micro-batches accumulated by each rank
    facts: dict[str, Any]  # what the checkpoints to come were made from
    finished: str = ""  # why there is nothing left to train; empty if there is

    @property
    def step(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def find_start(savedir: Path, run: RunArgs, cfg: ExperimentConfig, facts: dict[str, Any]) -> Start:
    """Decide it under the lock of the run's folder. Raises `DsskError` if a checkpoint does not fit.

    A launcher that restarts its ranks resumes, whatever `-r` says: the reset has happened.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if run.reset and not restarted:
        return Start(True, None, [], cfg.skip_steps, facts)
    checkpoint, skipped = newest_checkpoint(savedir)
    if checkpoint is None:
        return Start(False, None, skipped, cfg.skip_steps, facts)
    manifest = load_manifest(checkpoint)
    _check_facts(checkpoint, manifest, facts, run)
    finished = _finished(checkpoint, run, cfg)
    return Start(False, checkpoint, skipped, _skip_steps(manifest, cfg), facts, finished)


def _check_facts(checkpoint: Path, manifest: dict[str, Any], facts: dict[str, Any], run: RunArgs) -> None:
    if missing := [name for name in FACTS if manifest.get(name) is None]:
        raise DamagedData(f"{checkpoint / MANIFEST} is damaged: it says no {missing[0]}")
    if changed := differences(manifest["experiment"], facts["experiment"]):
        raise DsskError(f"{checkpoint} is of another experiment: {changed}; -r 1 starts afresh")
    if manifest["data"] != facts["data"]:
        raise DsskError(f"{checkpoint} was trained on other data than {run.data_path}; -r 1 starts afresh")
    base = manifest.get("base_fingerprint")  # absent in what version 0.1 wrote
    if base is not None and base != facts["base_fingerprint"]:
        raise DsskError(
            f"{checkpoint} was trained on another base: the weights of {facts['experiment']['model_path']} have "
            "changed since; bring them back, or start afresh with -r 1"
        )


def _finished(checkpoint: Path, run: RunArgs, cfg: ExperimentConfig) -> str:
    step, state = checkpoint_step(checkpoint), load_run_state(checkpoint)
    if state.get("evaluation_due"):
        return ""
    if step >= run.steps:
        return f"finished: step {step} of {run.steps}; more --steps go on from there, -r 1 starts afresh"
    used = state.get("cpu_seconds", 0.0) / 60
    if run.minutes is not None and used >= run.minutes:
        return (
            f"finished: step {step}, {used:.1f} CPU minutes of {run.minutes:g}; more --minutes go on from there, -r 1 "
            "starts afresh"
        )
    if is_exhausted(load_trainer_state(checkpoint)["log_history"], cfg.early_stopping_patience):
        return (
            f"finished: stopped early at step {step}, after {cfg.early_stopping_patience} evaluations that were no "
            "better; -r 1 starts afresh"
        )
    return ""


def _skip_steps(manifest: dict[str, Any], cfg: ExperimentConfig) -> int:
    """Micro-batches for each rank that keep the global batch of the checkpoint."""
    ranks = launched()
    micro_batches = manifest["world_size"] * manifest["skip_steps"]
    if micro_batches % ranks:
        fitting = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise DsskError(
            f"the run was begun on {manifest['world_size']} ranks, {micro_batches} micro-batches of "
            f"{cfg.train_batch_size} rows a step: {ranks} ranks cannot share them evenly, want {' or '.join(fitting)}"
        )
    return micro_batches // ranks
