"""haven's `JobManager` as we use it: it decides what to launch and talks to the toolkit."""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dssk.config import experiment_id
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.jobs import slurm
from dssk.jobs.states import GONE, state_of
from dssk.utils.files import publish_json, remove

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # haven 0.7.3 imports pkg_resources, which says that it is deprecated
    from haven import haven_jobs

EXP_DICT = "exp_dict.json"  # haven's names
JOB_DICT = "job_dict.json"
IGNORE_FILE = ".havenignore"


def use_our_slurm() -> None:
    """Let haven find our module in place of its `slurm_manager`; `dssk/jobs/slurm.py` says why."""
    haven_jobs.slurm_manager = slurm


class Jobs(haven_jobs.JobManager):
    """haven's job manager with whole files, a copy of the code without secrets, and every state a scheduler knows."""

    def __init__(self, experiments: list[dict], savedir_base: Path, scheduler: str, **settings: Any):
        use_our_slurm()
        with _one_line_errors(scheduler):
            super().__init__(
                exp_list=experiments,
                savedir_base=str(savedir_base),
                job_scheduler=scheduler,
                save_logs=False,  # haven would put the paths of the log files into the command unquoted
                verbose=0,
                **settings,
            )
        self.scheduler = scheduler

    def job_of(self, exp_dict: dict) -> dict[str, Any] | None:
        """What haven stored about the job of an experiment; None before its first submission."""
        path = self.savedir(exp_dict) / JOB_DICT
        return read_json(path) if path.exists() else None

    def savedir(self, exp_dict: dict) -> Path:
        """The experiment's folder."""
        return Path(self.savedir_base) / experiment_id(exp_dict)

    def get_jobs_dict(self, job_id_list: list[str]) -> dict[str, dict[str, Any]]:
        """Each job with one of the five `state`s and the one `reported`; one that was forgotten by all is `GONE`."""
        found = super().get_jobs_dict(job_id_list)
        return {job_id: self._with_state(job_id, found.get(job_id)) for job_id in job_id_list}

    def get_job(self, job_id: str) -> dict[str, Any]:
        """One job, as in `get_jobs_dict`."""
        return self.get_jobs_dict([job_id])[job_id]

    def _with_state(self, job_id: str, job: dict[str, Any] | None) -> dict[str, Any]:
        job = job or {"state": GONE, "runs": []}
        reported = job["state"]
        if reported == GONE:
            savedirs = [
                self.savedir(e) for e in self.exp_list if (self.job_of(e) or {}).get("job_id") == job_id
            ]
            reported = next((s for d in savedirs if (s := slurm.ended_state(d, job_id))), GONE)
        return job | {"state": state_of(reported), "reported": reported}

    def launch_exp_dict(self, exp_dict: dict, savedir: str, command: str, job: Any = None) -> dict[str, Any]:
        """Submit the job of one experiment; called by haven once it has decided to."""
        folder = Path(savedir)
        folder.mkdir(parents=True, exist_ok=True)
        store_experiment(folder / EXP_DICT, exp_dict)
        copy_code(Path(self.workdir), folder / "code", Path(self.savedir_base))
        job_dict = {"job_id": self.submit_job(command, folder / "code"), "command": command}
        publish_json(folder / JOB_DICT, job_dict | {"job_scheduler": self.scheduler})
        return job_dict


def store_experiment(path: Path, exp_dict: dict[str, Any]) -> None:
    """Write the experiment that a job will read, whole; refuse to replace another one of the same id."""
    if path.exists() and (stored := read_json(path)) != exp_dict:
        differing = sorted(key for key in stored | exp_dict if stored.get(key) != exp_dict.get(key))
        raise DamagedData(f"{path} is another experiment than the one to submit: it differs in {differing}")
    publish_json(path, exp_dict)


def copy_code(source: Path, target: Path, savedir_base: Path) -> None:
    """Copy the working directory, less dot files, what `.havenignore` names, and the experiments themselves."""
    patterns = shutil.ignore_patterns(".*", *ignored_names(source))

    def ignore(folder: str, names: list[str]) -> set[str]:
        inside = {name for name in names if (Path(folder) / name).resolve() == savedir_base.resolve()}
        return set(patterns(folder, names)) | inside

    remove(target)
    shutil.copytree(source, target, symlinks=True, ignore=ignore)


def ignored_names(source: Path) -> list[str]:
    """The lines of `.havenignore`."""
    file = source / IGNORE_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_json(path: Path) -> Any:
    """The content of a JSON file that we or haven wrote."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DamagedData(f"{path} is not JSON: {error}") from None


@contextlib.contextmanager
def _one_line_errors(scheduler: str) -> Iterator[None]:
    """haven reports a missing client and an unreachable cluster by whatever is at hand."""
    try:
        yield
    except ValueError as error:
        if "toolkit is not supported" in str(error):
            raise DsskError(
                "-j toolkit needs the package eai_toolkit_client, which comes with access to the toolkit: "
                "elsewhere use -j slurm"
            ) from None
        raise
    except SystemExit as error:
        raise EnvironmentFault(f"the {scheduler} cannot be reached: {error.code}") from None
