"""What happens beside training: the metrics file, and stopping on NaN."""

import json
import math
from pathlib import Path

from transformers import TrainerCallback

from dssk.errors import Diverged

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Append everything that is logged to `metrics.jsonl`, one JSON object a line, whatever else logs it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with (Path(args.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class StopOnNaN(TrainerCallback):
    """End the run when a logged loss is NaN or infinite, before a checkpoint of it is written."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise Diverged(
                    f"{name} is {value} at step {state.global_step}: lower the learning rate, or use bf16"
                )
