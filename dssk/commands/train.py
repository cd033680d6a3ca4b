"""Train the cross-attention blocks of an experiment.

    dssk train -e GROUP --data_path DIR -sb RUNS --steps 1_000

The experiment is defined in exp_configs.py in the current directory; `-j` also reads job_configs.py there. `python
trainval.py` is the same command with the two files beside it.
"""

import argparse
import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dssk.errors import DsskError
from dssk.training.flags import (
    DEFAULT_GENERATION_SAMPLES,
    DEFAULT_KEPT_CHECKPOINTS,
    DEFAULT_LOG_EVERY,
    DEFAULT_STEPS,
    FUSED_CHOICES,
    JOB_ACTIONS,
    RunArgs,
)
from dssk.utils.flags import Parser, bool_flag, count, minutes, optional_str, positive_int

EXP_CONFIGS, JOB_CONFIGS = Path("exp_configs.py"), Path("job_configs.py")
Groups = dict[str, list[dict[str, Any]]]


def main(
    argv: Sequence[str] | None = None, groups: Groups | None = None, job_configs: Any | None = None
) -> None:
    """Train, or submit jobs; `groups` and `job_configs` stand for the files that no flag names."""
    words = sys.argv[1:] if argv is None else argv
    if file := listed_file(words):
        print(list_groups(load_groups(file, groups)))
        return
    parser = build_parser()
    namespace = parser.parse_args(words)
    args = run_args(parser, namespace)
    chosen = load_groups(namespace.exp_configs, groups) if args.exp_group else {}
    if args.job_scheduler and not args.dry_run:
        from dssk.jobs.submit import submit

        submit(args, chosen, load_job_configs(namespace.job_configs, job_configs))
        return
    if args.wandb_project_name:
        from dssk.utils.wandb_key import give_key_to_wandb

        give_key_to_wandb()
    from dssk.training.run import train

    train(args, chosen)


# --- the files that say what to train, and where ----------------------------------------------------------------


def listed_file(words: Sequence[str]) -> Path | None:
    """The file whose groups `--list` asks for, whatever other flags are missing; None without that flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--exp_configs", type=Path, default=EXP_CONFIGS)
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError:  # the parser of all flags will say so
        return None
    return known.exp_configs if known.list and not {"-h", "--help"} & set(rest) else None


def load_groups(file: Path, given: Groups | None) -> Groups:
    """EXP_GROUPS of a file, or those that are given if no file was named."""
    if given is not None and file == EXP_CONFIGS:
        return given
    groups = getattr(load_module(file, "--exp_configs"), "EXP_GROUPS", None)
    if not isinstance(groups, dict) or not groups:
        raise DsskError(f"{file} defines no EXP_GROUPS: want a dict of lists of experiments")
    if wrong := [name for name, experiments in groups.items() if not is_group(name, experiments)]:
        raise DsskError(
            f"{file}: EXP_GROUPS[{wrong[0]!r}] is no group: want a list of experiments, each a dict"
        )
    return groups


def is_group(name: Any, experiments: Any) -> bool:
    """Whether this is a name of a group and a list of experiments, right or wrong ones."""
    if not isinstance(name, str) or not isinstance(experiments, list) or not experiments:
        return False
    return all(isinstance(e, dict) and all(isinstance(key, str) for key in e) for e in experiments)


def load_job_configs(file: Path, given: Any | None) -> Any:
    """The module that says where jobs run: a file's, or the given one if no file was named."""
    module = given if given is not None and file == JOB_CONFIGS else load_module(file, "--job_configs")
    for name in ("JOB_CONFIG", "EAI_ACCOUNT_ID_TO_USER"):
        if not hasattr(module, name):
            raise DsskError(f"{file} defines no {name}: resources/ has examples")
    return module


def load_module(file: Path, flag: str) -> ModuleType:
    """Run a Python file of the user's; what goes wrong in it is named with its line."""
    if not file.is_file():
        raise DsskError(
            f"no file {file} in {Path.cwd()}: go to the folder that holds it, or name one with {flag} FILE.py"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise DsskError(f"{file} is no Python file: want one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # it may import its neighbours
    try:
        # Python's warnings about the file would come before its error.
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            spec.loader.exec_module(module)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else line_in(error, file)
        raise DsskError(f"{file}:{line}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def line_in(error: BaseException, file: Path) -> int | None:
    """The last line of `file` that the error came through."""
    line, trace = None, error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == file.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def list_groups(groups: Groups) -> str:
    """The experiment groups, one a line."""
    from dssk.config import expand_group

    width = max(map(len, groups))
    return "\n".join(
        f"{name:{width}}  {_summary(expand_group([first])[0])}" for name, (first, *_) in groups.items()
    )


def _summary(exp_dict: dict[str, Any]) -> str:
    from dssk.config import merged_name

    get = exp_dict.get
    reader = f"{get('num_cross_attn_layers')} blocks at stride {get('cross_attn_layers_stride')}"
    if get("reader") == "merged":
        reader = merged_name(get("encode_layer", "last"), get("reader_replay", 0))
    return f"{get('model_path')}, {reader}, {get('context_size')} tokens"


# --- the flags --------------------------------------------------------------------------------------------------


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


def build_parser() -> Parser:
    parser = Parser(prog="dssk train", description=__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("-e", "--exp_group", type=optional_str, metavar="GROUP", help="experiment group")
    what.add_argument("--list", action="store_true", help="list the experiment groups and exit")
    what.add_argument(
        "--exp_id",
        type=optional_str,
        metavar="ID",
        help="train the experiment stored under this id in --savedir_base",
    )
    what.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the experiment; repeatable",
    )
    what.add_argument(
        "--exp_configs", type=Path, default=EXP_CONFIGS, metavar="FILE.py", help="where EXP_GROUPS is defined"
    )
    where = parser.add_argument_group("where and how long")
    where.add_argument(
        "-sb",
        "--savedir_base",
        required=True,
        metavar="DIR",
        help="parent folder of all runs; each has its own, named by its id",
    )
    where.add_argument("--data_path", required=True, metavar="DIR", help="store that dssk preproc made")
    where.add_argument(
        "-r",
        "--reset",
        type=bool_flag,
        default=False,
        metavar="BOOL",
        help="1: start again, and move the old run to deleted/; 0: resume",
    )
    where.add_argument(
        "--steps",
        type=positive_int,
        default=DEFAULT_STEPS,
        metavar="STEPS",
        help="total number of optimizer steps",
    )
    where.add_argument(
        "--minutes",
        type=minutes,
        metavar="CPU_MINUTES",
        help="end after this CPU time of the process, evaluations and checkpoints not counted, if --steps do not end "
        "it sooner; the learning rate is scheduled over this time",
    )
    where.add_argument(
        "--log_every",
        type=positive_int,
        default=DEFAULT_LOG_EVERY,
        metavar="STEPS",
        help="interval of logs, evaluations and checkpoints",
    )
    where.add_argument(
        "--save_total_limit",
        type=positive_int,
        default=DEFAULT_KEPT_CHECKPOINTS,
        metavar="CHECKPOINTS",
        help="newest checkpoints to keep, in addition to the best one",
    )
    where.add_argument(
        "--save_fused",
        type=fused_choices,
        default="final,best",
        metavar="WHEN",
        help="when to write the fused model (base and blocks in one): final, best, every (checkpoint), never; "
        "comma-separated",
    )
    where.add_argument(
        "--generation_eval_samples",
        type=count,
        default=DEFAULT_GENERATION_SAMPLES,
        metavar="QUESTIONS",
        help="validation questions to answer for EM and F1 in each evaluation; 0: loss only",
    )
    where.add_argument(
        "--report_to",
        type=optional_str,
        metavar="LOGGER",
        help="further loggers of transformers, such as tensorboard; comma-separated",
    )
    where.add_argument(
        "--dry_run",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="print the experiment, the model's layout and the memory and disk it needs, and exit",
    )
    where.add_argument(
        "--push_to_hub",
        type=optional_str,
        metavar="USER/NAME",
        help="Hub repository to upload the final model to",
    )
    wandb = parser.add_argument_group("Weights & Biases (needs entity and project)")
    wandb.add_argument("--wandb_entity_name", type=optional_str, metavar="NAME", help="user or team")
    wandb.add_argument("--wandb_project_name", type=optional_str, metavar="NAME", help="project")
    wandb.add_argument(
        "--wandb_run_name", type=optional_str, metavar="NAME", help="name of the run (default: chosen by W&B)"
    )
    wandb.add_argument(
        "--wandb_log_gradients",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="log gradient histograms",
    )
    how = parser.add_argument_group("launchers")
    how.add_argument(
        "-j",
        "--j",
        "--job_scheduler",
        dest="job_scheduler",
        type=optional_str,
        metavar="SCHEDULER",
        help="toolkit or slurm: submit each experiment of the group as a job (default: train here)",
    )
    how.add_argument(
        "--job_configs", type=Path, default=JOB_CONFIGS, metavar="FILE.py", help="where JOB_CONFIG is defined"
    )
    how.add_argument(
        "--job_action",
        type=job_action,
        metavar="ACTION",
        help="of -j: run (submit jobs that are new or have failed), status, reset (stop and start again), kill or logs "
        "(default: run; on a terminal the command asks)",
    )
    how.add_argument(
        "--python_binary",
        default="python",
        metavar="COMMAND",
        help="launcher of a job; NGPUS is replaced by its number of GPUs",
    )
    how.add_argument(
        "--deepspeed", type=optional_str, metavar="FILE.json", help="DeepSpeed configuration file (JSON)"
    )
    how.add_argument(
        "--dist_url",
        type=optional_str,
        metavar="URL",
        help="ignored; some launchers pass it",
    )
    how.add_argument(
        "--local_rank",
        type=int,
        default=-1,
        metavar="RANK",
        help="ignored in favour of LOCAL_RANK; some launchers pass it",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RunArgs:
    """Parse the flags of training; a mistake is one line on standard error and exit code 2."""
    return run_args(build_parser(), build_parser().parse_args(argv))


def run_args(parser: Parser, namespace: argparse.Namespace) -> RunArgs:
    """The flags of a run, checked against each other."""
    if (namespace.exp_group is None) == (namespace.exp_id is None):
        parser.error("want one of --exp_group and --exp_id")
    if namespace.exp_id and namespace.overrides:
        parser.error("--set changes an experiment of --exp_group: that of --exp_id is stored as it is")
    if bool(namespace.wandb_entity_name) != bool(namespace.wandb_project_name):
        parser.error("logging to Weights & Biases needs both --wandb_entity_name and --wandb_project_name")
    return RunArgs(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(RunArgs)})
