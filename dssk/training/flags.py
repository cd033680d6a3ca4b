"""Where and how long to run: what the flags of `dssk train` and `trainval.py` say. What to run is an experiment.

Every flag survives being sent again as `--name value`, as a job scheduler does.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from dssk.utils.ranks import launched

RESET_FLAGS = ("-r", "--reset")
COMMANDS = {"trainval.py": ["python", "trainval.py"], "dssk": ["dssk"]}  # how a user starts training

DEFAULT_STEPS = 1_000
DEFAULT_LOG_EVERY = 100
JOB_ACTIONS = ("run", "status", "reset", "kill", "logs")
DEFAULT_KEPT_CHECKPOINTS = 3
DEFAULT_GENERATION_SAMPLES = 64
FUSED_CHOICES = ("final", "best", "every", "never")


@dataclass(frozen=True)
class RunArgs:
    """One call of `dssk train`; the meaning of each field is its flag's help."""

    exp_group: str | None
    exp_id: str | None
    savedir_base: str
    data_path: str
    reset: bool
    job_scheduler: str | None
    job_action: str | None
    python_binary: str
    steps: int
    minutes: float | None
    log_every: int
    save_total_limit: int
    save_fused: str
    generation_eval_samples: int
    report_to: str | None
    dry_run: bool
    wandb_entity_name: str | None
    wandb_project_name: str | None
    wandb_run_name: str | None
    wandb_log_gradients: bool
    push_to_hub: str | None
    deepspeed: str | None
    dist_url: str | None
    local_rank: int
    overrides: list[str]


def resuming_command(run: RunArgs) -> str:
    """The command that continues this run after a stop: that of this process without its reset, or words for it."""
    program = Path(sys.argv[0]).name
    if launched() > 1 or program not in COMMANDS:
        return "the same command goes on from there" + (", without -r 1" if run.reset else "")
    words = list(sys.argv[1:])
    for flag in RESET_FLAGS:
        while flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    words = [word for word in words if not word.startswith(tuple(f"{flag}=" for flag in RESET_FLAGS))]
    return f"{shlex.join([*COMMANDS[program], *words])} goes on from there"
