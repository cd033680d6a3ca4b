"""Every experiment of a group as a job: what `trainval.py -j toolkit` and `-j slurm` do."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dssk.config import experiment_id, parse_experiment
from dssk.errors import DsskError
from dssk.jobs.command import job_command, with_logs_and_signals
from dssk.jobs.config import SlurmConfig, ToolkitConfig, parse_job_config, toolkit_account
from dssk.jobs.states import ALIVE, FAILED, NEVER_LAUNCHED
from dssk.run_folder import ERRORS, LOGS, last_lines, move_aside
from dssk.training.flags import JOB_ACTIONS, RunArgs
from dssk.training.run import chosen_experiments
from dssk.utils.wandb_key import KEY_FILE

if TYPE_CHECKING:
    from dssk.jobs.haven import Jobs

LOG_LINES = 10
Groups = dict[str, list[dict[str, Any]]]


def submit(args: RunArgs, groups: Groups, job_configs: Any) -> None:
    """Do what `--job_action` says with the jobs of the chosen experiments; `job_configs` is the module."""
    args = with_absolute_paths(args)
    experiments = chosen_experiments(args, groups)
    check_experiments(experiments)
    config = parse_job_config(str(args.job_scheduler), args.exp_group, job_configs.JOB_CONFIG)
    jobs = open_jobs(args, experiments, config, job_configs.EAI_ACCOUNT_ID_TO_USER)
    from dssk.jobs.notebook import create_notebook  # haven is there now

    action = args.job_action or (ask() if sys.stdin.isatty() else "run")
    if action in ("run", "reset"):
        launch(jobs, args, config.num_ranks, kill=action == "reset")
        create_notebook(Path(args.savedir_base), str(args.job_scheduler))
    elif action == "kill":
        kill(jobs)
    elif action == "logs":
        show_logs(jobs)
    show_status(jobs)


def check_experiments(experiments: list[dict[str, Any]]) -> None:
    """Refuse what a job would refuse, before any is submitted."""
    for exp_dict in experiments:
        model_path = parse_experiment(exp_dict).model_path
        if not Path(model_path).is_absolute() and Path(model_path).exists():
            raise DsskError(
                f"model_path is {model_path}, a folder relative to this one, and a job runs in its own copy of the "
                f"code: use --set model_path={Path(model_path).resolve()}"
            )


def with_absolute_paths(args: RunArgs) -> RunArgs:
    """The same flags with paths that hold in any working directory."""
    deepspeed = args.deepspeed and str(Path(args.deepspeed).absolute())
    return dataclasses.replace(
        args,
        savedir_base=str(Path(args.savedir_base).absolute()),
        data_path=str(Path(args.data_path).absolute()),
        deepspeed=deepspeed,
    )


def open_jobs(
    args: RunArgs, experiments: list[dict], config: ToolkitConfig | SlurmConfig, users: dict[str, str]
) -> "Jobs":
    """haven's job manager for the experiments."""
    if isinstance(config, ToolkitConfig):
        account, user = toolkit_account(users)
        spec = config.spec(user)
    else:
        account, spec = config.account or "", config.spec()
    try:
        from dssk.jobs.haven import Jobs
    except ImportError as error:
        raise DsskError(f'-j needs haven-ai ({error}): pip install "dssk[haven]"') from None
    return Jobs(
        experiments,
        Path(args.savedir_base),
        str(args.job_scheduler),
        workdir=str(Path.cwd()),
        job_config=spec,
        account_id=account,
    )


def ask() -> str:
    """haven's menu, on a terminal."""
    answer = input(f"{' | '.join(JOB_ACTIONS)} [run]: ").strip() or "run"
    if answer not in JOB_ACTIONS:
        raise DsskError(f"got {answer!r}, want one of {', '.join(JOB_ACTIONS)}")
    return answer


def launch(jobs: "Jobs", args: RunArgs, num_ranks: int, kill: bool) -> None:
    """Submit what has not run, and what failed; with `-r 1` or `kill` what is there is moved aside first.

    A job that is queued or running is left alone unless `kill` is true.
    """
    # All commands are checked before the first job is submitted.
    commands = {id: command_of(args, id, num_ranks) for id in map(experiment_id, jobs.exp_list)}
    states = job_states(jobs)
    for exp_dict in jobs.exp_list:
        exp_id, savedir = experiment_id(exp_dict), jobs.savedir(exp_dict)
        alive = states[exp_id]["state"] in ALIVE
        if alive and kill:
            jobs.kill_job(states[exp_id]["job_id"])
        if kill or (args.reset and not alive):
            move_aside(savedir)
        done: dict[str, dict] = {}
        jobs.launch_or_ignore_exp_dict(exp_dict, commands[exp_id], False, str(savedir), done)
        print(f"{exp_id}  {done.popitem()[1]['message']}", flush=True)


def command_of(args: RunArgs, exp_id: str, num_ranks: int) -> str:
    """The command of an experiment's job, as the scheduler gets it."""
    command = job_command(args, exp_id, num_ranks, Path.cwd() / KEY_FILE)
    if args.job_scheduler == "toolkit":
        return with_logs_and_signals(command, Path(args.savedir_base) / exp_id)
    return command


def job_states(jobs: "Jobs") -> dict[str, dict[str, Any]]:
    """For each experiment's id its `job_id`, `state` and the scheduler's word for it, `reported`."""
    ids = {experiment_id(exp_dict): jobs.job_of(exp_dict) for exp_dict in jobs.exp_list}
    found = jobs.get_jobs_dict([job["job_id"] for job in ids.values() if job])
    never = {"state": NEVER_LAUNCHED, "reported": NEVER_LAUNCHED, "job_id": None}
    return {
        exp_id: found[job["job_id"]] | {"job_id": job["job_id"]} if job else never
        for exp_id, job in ids.items()
    }


def show_status(jobs: "Jobs") -> None:
    """One line for each experiment, and how many are in which state."""
    states = job_states(jobs)
    for exp_id, job in states.items():
        word = f" ({job['reported']})" if job["reported"] != job["state"] else ""
        print(f"{exp_id}  job {job['job_id'] or '-'}  {job['state']}{word}")
    counts = Counter(job["state"] for job in states.values())
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


def show_logs(jobs: "Jobs") -> None:
    """The end of each job's log; of its errors if it failed."""
    states = job_states(jobs)
    for exp_dict in jobs.exp_list:
        failed = states[experiment_id(exp_dict)]["state"] == FAILED
        file = jobs.savedir(exp_dict) / (ERRORS if failed else LOGS)
        print("\n".join([f"== {file}", *last_lines(file, LOG_LINES)]))


def kill(jobs: "Jobs") -> None:
    """End what is queued or running."""
    for job in job_states(jobs).values():
        if job["state"] in ALIVE:
            jobs.kill_job(job["job_id"])
