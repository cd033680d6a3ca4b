"""Slurm behind the interface of haven's `slurm_manager`: a batch script, `sbatch`, `squeue`, `scancel`.

haven's own module (0.7.3) waits for keyboard input in `sanity_check`, ends the process where there is no accounting,
knows half of Slurm's states, inserts paths unquoted and has no multi-node launch: nothing of it could stay.
"""

import getpass
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from dssk.errors import DsskError, EnvironmentFault, Preempted
from dssk.jobs.states import ALIVE, GONE, state_of
from dssk.run_folder import ERRORS, JOB_CODE, JOB_ENDED, JOB_SCRIPT, LOGS, STATUS
from dssk.utils.files import write_text

KILL_SECONDS = 120
TRIES = 5
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

# Slurm sends SIGTERM to all processes of a job, shells included: both must outlive the training that saves.
BATCH_SCRIPT = """\
#!/bin/bash
# Written at submission; Slurm runs it from the top again after a requeue.
trap : TERM
cd {code} || exit 3
: >{ended}
if [ {nodes} -gt 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
    export PET_NNODES={nodes} PET_RDZV_ID="$SLURM_JOB_ID"
    export DSSK_RENDEZVOUS="${{address:-$first}}:$((20000 + SLURM_JOB_ID % 20000))"
fi
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 \\
    ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} bash -c {command}
code=$?
if [ $code -ne 0 ] && [ {status} -nt {ended} ] && grep -qs '"code": {preempted}\\b' {status}; then
    code={preempted}  # torchrun makes every code 1
fi
if [ $code -eq {preempted} ] && [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # saved before the time limit or the pre-emption: go on later
fi
echo "$SLURM_JOB_ID $code" >{ended}
exit $code
"""


def sanity_check() -> None:
    """Raise unless there is a Slurm to talk to."""
    _slurm("squeue", "--version")


def submit_job(
    api: None,
    account_id: str | None,
    command: str,
    job_config: dict,
    workdir: str,
    savedir_logs: str | None = None,
) -> str:
    """Write the batch script into the experiment's folder and submit it; returns the job's id."""
    savedir = Path(workdir).parent
    script = savedir / JOB_SCRIPT
    write_text(script, batch_script(command, job_config["nodes"], savedir))
    account = [f"--account={account_id}"] if account_id else []
    return _slurm(
        "sbatch",
        "--parsable",
        f"--job-name=dssk-{savedir.name}",
        f"--nodes={job_config['nodes']}",
        "--ntasks-per-node=1",
        "--open-mode=append",
        f"--output={_literal(savedir / LOGS)}",
        f"--error={_literal(savedir / ERRORS)}",
        *account,
        *job_config["options"],
        str(script),
    ).split(";")[0]  # ";cluster" follows in a federation


def batch_script(command: str, nodes: int, savedir: Path) -> str:
    """The text of the batch script that runs `command` once on each node."""
    return BATCH_SCRIPT.format(
        nodes=nodes,
        code=shlex.quote(str(savedir / JOB_CODE)),
        command=shlex.quote(f"trap : TERM; {command}"),
        preempted=Preempted.exit_code,
        status=shlex.quote(str(savedir / STATUS)),
        ended=shlex.quote(str(savedir / JOB_ENDED)),
    )


def get_jobs(api: None, account_id: str | None) -> list[dict[str, Any]]:
    """The user's jobs that Slurm still knows without accounting."""
    lines = _slurm(
        "squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%i %T"
    ).splitlines()
    return [dict(zip(("job_id", "state"), line.split(), strict=True)) for line in lines]


def get_jobs_dict(api: None, job_id_list: list[str]) -> dict[str, dict[str, Any]]:
    """The state of each job, from `squeue`; of ended ones from `sacct`, where there is accounting."""
    known = {job["job_id"]: job["state"] for job in get_jobs(None, None)} if job_id_list else {}
    ended = [job_id for job_id in job_id_list if job_id not in known]
    known |= _accounting(ended)
    return {job_id: {"state": known.get(job_id, GONE), "runs": []} for job_id in job_id_list}


def get_job(api: None, job_id: str) -> dict[str, Any]:
    """The state of one job."""
    return get_jobs_dict(None, [job_id])[job_id] | {"job_id": job_id}


def kill_job(api: None, job_id: str) -> None:
    """End a job: it gets SIGTERM, time to save, and is gone when this returns."""
    if state_of(get_job(None, job_id)["state"]) not in ALIVE:
        return
    _slurm("scancel", job_id)
    deadline = time.monotonic() + KILL_SECONDS
    while state_of(get_job(None, job_id)["state"]) in ALIVE:
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"job {job_id} still runs {KILL_SECONDS} s after scancel: see `squeue -j {job_id}`"
            )
        time.sleep(1)


def ended_state(savedir: Path, job_id: str) -> str | None:
    """The final state of a job by the file that it wrote at its end (`<job id> <exit code>`); None without one."""
    try:
        last_id, code = (savedir / JOB_ENDED).read_text().split()
    except (OSError, ValueError):
        return None
    if last_id != job_id:
        return None
    return "COMPLETED" if code == "0" else "PREEMPTED" if code == str(Preempted.exit_code) else "FAILED"


def _accounting(job_ids: list[str]) -> dict[str, str]:
    """States from `sacct`; none where the cluster keeps no accounts."""
    if not job_ids:
        return {}
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(job_ids)}"]
    try:
        lines = _slurm(*argv, "--format=JobID,State").splitlines()
    except DsskError:
        return {}
    return dict(line.split("|", 1) for line in lines if "|" in line)


def _slurm(*argv: str) -> str:
    """Run a command of Slurm without a shell, a terminal or secrets; a busy controller is asked again."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    for last in (False,) * (TRIES - 1) + (True,):
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
            )
        except FileNotFoundError:
            raise DsskError(
                f"{argv[0]} is not on PATH: -j slurm runs on a login node of a Slurm cluster"
            ) from None
        if done.returncode == 0:
            return done.stdout.strip()
        reason = (done.stderr or done.stdout).strip()
        # a submission that timed out may have been accepted: never send it twice
        if last or argv[0] == "sbatch" or "timed out" not in reason:
            break
        time.sleep(1)
    lines = reason.splitlines() or [f"exit code {done.returncode}"]
    raise EnvironmentFault(f"{argv[0]}: {lines[-1].removeprefix(f'{argv[0]}: ').removeprefix('error: ')}")


def _literal(path: Path) -> str:
    """A file name in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")
