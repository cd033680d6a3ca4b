"""The command of a job: text for `bash -c` in which no name, path or id can become a command."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from dssk.errors import DsskError
from dssk.run_folder import ERRORS, LOGS
from dssk.training.flags import RunArgs
from dssk.utils.wandb_key import KEY_FILE_VARIABLE

SCRIPT = "trainval.py"  # a job's working directory is its own copy of the current directory
MODULE = ("-m", "dssk", "train")  # instead, where that script is not: dssk is installed
NGPUS = re.compile(r"\$\{NGPUS\}|\$?\bNGPUS\b")
# A job trains a stored experiment: it gets no group and no overrides. It never resets, nor submits jobs itself.
NOT_SENT = {
    *("exp_group", "overrides", "reset", "dry_run", "job_scheduler", "job_action", "python_binary"),
    *("dist_url", "local_rank"),
}


def job_command(args: RunArgs, exp_id: str, num_ranks: int, key_file: Path) -> str:
    """The bash command that trains the experiment `exp_id` in a copy of the code.

    `--python_binary` is a piece of bash by its nature, so it stands as it is; every other value is quoted.
    """
    exports = (
        # Every torchrun of one node gets a free port: at the fixed default two jobs on a machine would collide.
        'export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT="${DSSK_RENDEZVOUS:-localhost:0}" '
        f"{KEY_FILE_VARIABLE}={shlex.quote(str(key_file))}"
    )
    program = [SCRIPT] if Path(SCRIPT).is_file() else MODULE
    return f"{exports}; {launcher(args.python_binary, num_ranks)} {shlex.join([*program, *job_flags(args, exp_id)])}"


def job_flags(args: RunArgs, exp_id: str) -> list[str]:
    """The flags of `trainval.py` for a job: `--name=value`, so that a value may begin with a dash."""
    values: dict[str, Any] = dataclasses.asdict(args) | {"exp_id": exp_id}
    flags = []
    for name, value in values.items():
        if name not in NOT_SENT and value is not None:
            flags += [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return flags


def launcher(python_binary: str, num_ranks: int) -> str:
    """`--python_binary` with the number of ranks for NGPUS; it must be complete, or it would swallow our quotes."""
    text = NGPUS.sub(str(num_ranks), python_binary).strip()
    if not text or "\n" in text or "\0" in text:
        raise DsskError(f"--python_binary is {python_binary!r}, want a command on one line, such as python")
    check = subprocess.run(["bash", "-n", "-c", f"{text} {SCRIPT}"], capture_output=True, text=True)
    if check.returncode or text.endswith("\\"):
        reason = (check.stderr.strip().splitlines() or ["it ends in a backslash"])[0].removeprefix("bash: ")
        raise DsskError(f"--python_binary is {python_binary!r}, which bash cannot read: {reason}")
    return text


def with_logs_and_signals(command: str, savedir: Path) -> str:
    """A toolkit job's command: appends to haven's log files, and hands SIGTERM on to the training.

    The toolkit runs a bash, and a container's first process is all that it stops: bash would not tell the launcher.
    """
    # In its own process group (set -m) the training gets the signal once; the first wait ends with the signal itself.
    logs, errors = (shlex.quote(str(savedir / name)) for name in (LOGS, ERRORS))
    return (
        f"exec >>{logs} 2>>{errors}; set -m; {{ trap : TERM; {command}; }} & set +m; "
        "trap 'kill -TERM -- -$!' TERM; wait $!; code=$?; "
        "[ $code -lt 128 ] || { wait $!; code=$?; }; exit $code"
    )
