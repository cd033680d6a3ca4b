"""haven's `JobManager` as we use it: it decides what to launch and talks to the toolkit."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dssk.config import experiment_id
from dssk.errors import DsskError, EnvironmentFault
from dssk.jobs import slurm
from dssk.jobs.states import GONE, state_of
from dssk.run_folder import DELETED, EXP_DICT, JOB_CODE, JOB_DICT, read_job, write_experiment
from dssk.utils.files import make_folder, remove, write_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # haven 0.7.3 imports pkg_resources, which says that it is deprecated
    from haven import haven_jobs

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

    def job_of(self, exp_dict: dict) -> dict[str, Any]:
        """haven's record of the job of an experiment; empty before its first submission."""
        return read_job(self.savedir(exp_dict))

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
            savedirs = [self.savedir(e) for e in self.exp_list if self.job_of(e).get("job_id") == job_id]
            reported = next((s for d in savedirs if (s := slurm.ended_state(d, job_id))), GONE)
        return job | {"state": state_of(reported), "reported": reported}

    def launch_exp_dict(self, exp_dict: dict, savedir: str, command: str, job: Any = None) -> dict[str, Any]:
        """Submit the job of one experiment; called by haven once it has decided to."""
        folder = Path(savedir)
        make_folder(folder)
        write_experiment(folder, exp_dict)
        copy_code(Path(self.workdir), folder / JOB_CODE, Path(self.savedir_base))
        job_dict = {"job_id": self.submit_job(command, folder / JOB_CODE), "command": command}
        write_json(folder / JOB_DICT, job_dict | {"job_scheduler": self.scheduler})
        return job_dict


def copy_code(source: Path, target: Path, savedir_base: Path) -> None:
    """Copy the working directory, less dot files, what `.havenignore` names, and the experiments themselves."""
    patterns = shutil.ignore_patterns(".*", *ignored_names(source))
    base = savedir_base.resolve()

    def is_of_experiments(path: Path) -> bool:
        inside = path.parent.resolve() == base and (path.name == DELETED or (path / EXP_DICT).exists())
        return inside or path.resolve() == base

    def ignore(folder: str, names: list[str]) -> set[str]:
        return set(patterns(folder, names)) | {n for n in names if is_of_experiments(Path(folder) / n)}

    remove(target)
    shutil.copytree(source, target, symlinks=True, ignore=ignore)


def ignored_names(source: Path) -> list[str]:
    """The lines of `.havenignore`."""
    file = source / IGNORE_FILE
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@contextlib.contextmanager
def _one_line_errors(scheduler: str) -> Iterator[None]:
    """haven reports a missing client and an unreachable cluster by whatever is at hand."""
    try:
        yield
    except ValueError as error:
        # haven replaces our own errors by one without the reason.
        if isinstance(error.__context__, DsskError):
            raise error.__context__ from None
        if "toolkit is not supported" in str(error):
            raise DsskError(
                "-j toolkit needs the package eai_toolkit_client, which comes with access to the toolkit: "
                "elsewhere use -j slurm"
            ) from None
        raise
    except SystemExit as error:
        raise EnvironmentFault(f"the {scheduler} cannot be reached: {error.code}") from None
