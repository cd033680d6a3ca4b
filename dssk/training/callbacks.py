"""Callbacks of training: the metrics file, fused checkpoints and progress on the terminal."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from dssk.checkpoint import checkpoint_folder
from dssk.errors import DsskError
from dssk.run_folder import METRICS, split_metrics
from dssk.training.budget import CpuBudget
from dssk.utils.console import watched
from dssk.utils.files import machine_faults, write_text

SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "eval_f1": "F1 {:.3f}",
    "eval_wrong_context_f1": "(wrong context {:.3f})",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class MetricsFile(TrainerCallback):
    """Append everything that is logged to `metrics.jsonl`, one JSON object a line, whatever else logs it."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop what is damaged, and what was logged after the checkpoint that one resumes from: it is trained again."""
        savedir = Path(args.output_dir)
        if state.is_world_process_zero and (savedir / METRICS).exists():
            lines, damaged = split_metrics(savedir)
            if damaged > 1:  # one is what a process leaves that is killed
                print(f"dssk: {damaged} damaged lines of {savedir / METRICS} are dropped", file=sys.stderr)
            kept = (line for line in lines if line["step"] <= state.global_step)
            write_text(savedir / METRICS, "".join(map(_line, kept)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        file = Path(args.output_dir) / METRICS
        if state.is_world_process_zero and logs:
            with machine_faults(file), file.open("a") as lines:
                lines.write(_line({"step": state.global_step, **logs}))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


class FuseEvery(TrainerCallback):
    """Write the fused model of each checkpoint into it, in a process that knows nothing of ranks and sharding."""

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        checkpoint = str(checkpoint_folder(Path(args.output_dir), state.global_step))
        command = [sys.executable, "-m", "dssk", "export", "--checkpoint", checkpoint]
        command += ["--output", f"{checkpoint}/fused"]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise DsskError(f"cannot fuse {checkpoint}: {result.stderr.strip().splitlines()[-1]}")


class Progress(TrainerCallback):
    """One line for each log; on a terminal a bar too, with the time left."""

    def __init__(self, budget: CpuBudget | None = None):
        self.budget = budget or CpuBudget()

    def on_train_begin(self, args, state, control, **kwargs):
        shown = watched() and state.is_world_process_zero
        self._start = (state.global_step, time.monotonic())
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=not shown, leave=False
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [text.format(logs[name]) for name, text in SHOWN.items() if name in (logs or {})]
        if not state.is_world_process_zero or not shown:
            return
        place = self.budget.place(state.global_step, state.max_steps)
        line = f"step {place}  {'  '.join(shown)}  {self._time_left(state)}"
        tqdm.write(line.rstrip(), file=sys.stdout)
        sys.stdout.flush()

    def _time_left(self, state) -> str:
        if self.budget.limit is not None:
            return ""
        first_step, start = self._start
        done, left = state.global_step - first_step, state.max_steps - state.global_step
        if not done or not left:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - start) / done * left), 60)
        return f"{minutes}:{seconds:02} left"

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
