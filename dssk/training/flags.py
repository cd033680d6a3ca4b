"""The flags of `trainval.py`: where and how long to run. What to run is an experiment of `exp_configs.py`.

Every flag survives being sent again as `--name value`, as a job scheduler does.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from dssk.utils.flags import Parser, bool_flag, count, optional_str, positive_int

DEFAULT_STEPS = 1_000
DEFAULT_LOG_EVERY = 100
JOB_ACTIONS = ("run", "status", "reset", "kill", "logs")
DEFAULT_KEPT_CHECKPOINTS = 3
DEFAULT_GENERATION_SAMPLES = 64
FUSED_CHOICES = ("final", "best", "every", "never")


@dataclass(frozen=True)
class RunArgs:
    """One call of `trainval.py`; the meaning of each field is its flag's help."""

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


def fused_choices(text: str) -> str:
    """Parse `--save_fused`: words of FUSED_CHOICES with commas between them."""
    words = frozenset(text.split(","))
    if unknown := words - {*FUSED_CHOICES}:
        raise argparse.ArgumentTypeError(f"got {sorted(unknown)[0]!r}, want {', '.join(FUSED_CHOICES)}")
    if "never" in words and len(words) > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want never alone or the others")
    return text


def job_action(text: str) -> str | None:
    """Parse `--job_action`."""
    action = optional_str(text)
    if action not in (None, *JOB_ACTIONS):
        raise argparse.ArgumentTypeError(f"got {text!r}, want {', '.join(JOB_ACTIONS)}")
    return action


def list_groups(groups: dict[str, list[dict[str, Any]]]) -> str:
    """The experiment groups, one a line."""
    width = max(map(len, groups))
    return "\n".join(
        f"{name:{width}}  {experiments[0]['model_path']}, {experiments[0]['num_cross_attn_layers']} blocks at stride "
        f"{experiments[0]['cross_attn_layers_stride']}, {experiments[0]['context_size']} tokens"
        for name, experiments in groups.items()
    )


class ListGroups(argparse.Action):
    """Print the groups it was made with, and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(list_groups(self.const))
        parser.exit()


def build_parser(groups: dict[str, list[dict[str, Any]]] | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog="trainval.py", description="Train the cross-attention blocks of an experiment.")
    what = parser.add_argument_group("what to train")
    what.add_argument("-e", "--exp_group", type=optional_str, help="group of experiments in exp_configs.py")
    what.add_argument(
        "--list",
        action=ListGroups,
        nargs=0,
        const=groups or {},
        dest=argparse.SUPPRESS,
        help="list the experiment groups and exit",
    )
    what.add_argument(
        "--exp_id", type=optional_str, help="train the one experiment stored under this id in --savedir_base"
    )
    what.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the experiment; may be given several times",
    )
    where = parser.add_argument_group("where and how long")
    where.add_argument(
        "-sb", "--savedir_base", required=True, help="folder under which each experiment gets its own"
    )
    where.add_argument("--data_path", required=True, help="folder made by dssk/data/preproc_nq.py")
    where.add_argument(
        "-r",
        "--reset",
        type=bool_flag,
        default=False,
        help="1: start afresh, moving what is there aside; 0: resume",
    )
    where.add_argument(
        "--steps", type=positive_int, default=DEFAULT_STEPS, help="optimizer steps in all (%(default)s)"
    )
    where.add_argument(
        "--log_every",
        type=positive_int,
        default=DEFAULT_LOG_EVERY,
        help="optimizer steps between logs, evaluations and checkpoints alike (%(default)s)",
    )
    where.add_argument(
        "--save_total_limit",
        type=positive_int,
        default=DEFAULT_KEPT_CHECKPOINTS,
        help="newest checkpoints to keep, besides the best one (%(default)s)",
    )
    where.add_argument(
        "--save_fused",
        type=fused_choices,
        default="final,best",
        metavar="WHEN",
        help="when to write the fused model, base and blocks in one: words of final, best, every (in each "
        "checkpoint) and never, with commas between them (%(default)s)",
    )
    where.add_argument(
        "--generation_eval_samples",
        type=count,
        default=DEFAULT_GENERATION_SAMPLES,
        help="questions of val answered in each evaluation, for EM and F1; 0: only the loss (%(default)s)",
    )
    where.add_argument(
        "--report_to", type=optional_str, help="further loggers of transformers, such as tensorboard"
    )
    where.add_argument(
        "--dry_run",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        help="print the experiment, the model's layout, memory and disk needed, and exit",
    )
    where.add_argument("--push_to_hub", type=optional_str, help="Hub repository that gets the final model")
    wandb = parser.add_argument_group("Weights & Biases (needs entity and project)")
    wandb.add_argument("--wandb_entity_name", type=optional_str, help="user or team")
    wandb.add_argument("--wandb_project_name", type=optional_str, help="project")
    wandb.add_argument("--wandb_run_name", type=optional_str, help="name of the run; optional")
    wandb.add_argument(
        "--wandb_log_gradients",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        help="log gradient histograms",
    )
    how = parser.add_argument_group("launchers")
    how.add_argument(
        "-j", "--j", "--job_scheduler", dest="job_scheduler", type=optional_str, help="toolkit or slurm"
    )
    how.add_argument(
        "--job_action",
        type=job_action,
        metavar="ACTION",
        help="what to do with the jobs of -j: run those that have not run or failed (default; a terminal is asked), "
        "status, reset (stop and start afresh), kill, logs",
    )
    how.add_argument(
        "--python_binary", default="python", help="what starts a job; NGPUS becomes its number of GPUs"
    )
    how.add_argument("--deepspeed", type=optional_str, help="DeepSpeed configuration file (JSON)")
    how.add_argument(
        "--dist_url", type=optional_str, help="rendezvous address, set by some launchers; not read"
    )
    how.add_argument(
        "--local_rank", type=int, default=-1, help="set by launchers; the environment's value is used"
    )
    return parser


def parse_args(
    argv: list[str] | None = None, groups: dict[str, list[dict[str, Any]]] | None = None
) -> RunArgs:
    """Parse the flags of `trainval.py`; a mistake is one line on standard error and exit code 2."""
    parser = build_parser(groups)
    namespace = parser.parse_args(argv)
    if (namespace.exp_group is None) == (namespace.exp_id is None):
        parser.error("want one of --exp_group and --exp_id")
    if bool(namespace.wandb_entity_name) != bool(namespace.wandb_project_name):
        parser.error("logging to Weights & Biases needs both --wandb_entity_name and --wandb_project_name")
    return RunArgs(**vars(namespace))
