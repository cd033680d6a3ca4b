"""Where and how long to run: what the flags of `dssk train` and `trainval.py` say. What to run is an experiment.

Every flag survives being sent again as `--name value`, as a job scheduler does.
"""

from dataclasses import dataclass

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
