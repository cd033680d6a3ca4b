"""DeepSpeed's configuration file, compared with the experiment before anything is loaded."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from dssk.config import ExperimentConfig
from dssk.errors import DsskError
from dssk.utils.json_files import parse_json
from dssk.utils.ranks import launched

AUTO = "auto"


def load_deepspeed_config(path: str, cfg: ExperimentConfig, skip_steps: int) -> dict[str, Any]:
    """The content of the file, checked, for a process that DeepSpeed's launcher has started.

    DeepSpeed is imported with its log on standard error; left alone, it would write to standard output.
    """
    config = check_deepspeed_config(path, cfg, skip_steps)
    if importlib.util.find_spec("deepspeed") is None:
        raise DsskError(
            "--deepspeed needs deepspeed: pip install 'dssk[deepspeed]', or use torchrun without it"
        )
    if "WORLD_SIZE" not in os.environ:
        raise DsskError(
            "--deepspeed needs its launcher: deepspeed --num_gpus N trainval.py ... in place of python"
        )
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")
    return config


def check_deepspeed_config(path: str, cfg: ExperimentConfig, skip_steps: int) -> dict[str, Any]:
    """The content of the file, with `skip_steps` in place of its gradient accumulation.

    Raises `DsskError` with every value that contradicts the experiment, the file's and the experiment's.
    """
    config = read_json_object(path)
    if config.get("gradient_accumulation_steps", AUTO) != AUTO:
        config["gradient_accumulation_steps"] = skip_steps
    wrong = [
        f"{key} is {value!r}, {wanted[0]} is {wanted[1]!r}"
        for key, wanted in expected(cfg, skip_steps).items()
        if (value := lookup(config, key)) not in (None, AUTO, wanted[1])
    ]
    if "scheduler" in config:
        wrong.append(f"scheduler is given, lr_scheduler_type is {cfg.lr_scheduler_type!r}")
    if str(lookup(config, "optimizer.type") or "AdamW").lower() != "adamw":
        wrong.append(f"optimizer.type is {lookup(config, 'optimizer.type')!r}, want 'AdamW'")
    if lookup(config, "zero_optimization.stage") not in (0, 1, 2, 3):
        wrong.append(f"zero_optimization.stage is {lookup(config, 'zero_optimization.stage')!r}, want 0 to 3")
    if wrong:
        raise DsskError(
            f'{path} contradicts the experiment: {"; ".join(wrong)}: write "auto" there, or change one'
        )
    return config


def read_json_object(path: str) -> dict[str, Any]:
    try:
        config = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise DsskError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise DsskError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DsskError(f"{path} holds a {type(config).__name__}, want a JSON object")
    return config


def expected(cfg: ExperimentConfig, skip_steps: int) -> dict[str, tuple[str, Any]]:
    """Expected values of the file's settings, each with the key of the experiment that it must agree with."""
    ranks = launched()
    rows = cfg.train_batch_size * skip_steps * ranks
    return {
        "train_micro_batch_size_per_gpu": ("train_batch_size", cfg.train_batch_size),
        "train_batch_size": (f"train_batch_size x skip_steps x {ranks} ranks", rows),
        "gradient_clipping": ("max_grad_norm", cfg.max_grad_norm),
        "fp16.enabled": ("fp16", cfg.fp16),
        "bf16.enabled": ("bf16", cfg.bf16),
        "optimizer.params.lr": ("learning_rate", cfg.learning_rate),
        "optimizer.params.betas": ("[adam_beta1, adam_beta2]", [cfg.adam_beta1, cfg.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", cfg.adam_epsilon),
        "optimizer.params.weight_decay": ("weight_decay", cfg.weight_decay),
    }


def lookup(config: Any, path: str) -> Any:
    """The value at `a.b.c`, None where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config
