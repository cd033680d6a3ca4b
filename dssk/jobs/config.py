"""Where jobs run: the keys of `JOB_CONFIG`, their types and meanings. Values live in `job_configs.py`."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dssk.config import faults
from dssk.errors import DsskError

DEFAULT_GROUP = "default"
VARIABLE = re.compile("[A-Z0-9_]+")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        if not _is_printable(value):
            raise ValueError("it holds a character that cannot be printed, which no command line takes")
        return value


class ToolkitResources(_Checked):
    """Resources of one toolkit job; a key that is None is left to the toolkit."""

    gpu: int = Field(ge=0, description="GPUs; they replace NGPUS in --python_binary")
    cpu: float | None = Field(None, gt=0, description="cores")
    mem: int | None = Field(None, ge=1, description="memory in GB")
    gpu_mem: int | None = Field(None, ge=1, description="least memory of a GPU in GB")
    gpu_model: str | None = Field(None, description="such as A100; !A100 for any other")


class JobConfig(_Checked):
    """Settings that both schedulers have."""

    num_processes: int | None = Field(
        None, ge=1, description="ranks on a node, which replace NGPUS; None: its GPUs, or 1 without any"
    )

    @property
    def num_gpus(self) -> int:
        """GPUs of one node."""
        raise NotImplementedError

    @property
    def num_ranks(self) -> int:
        """The number that replaces NGPUS in `--python_binary`."""
        return self.num_processes or max(1, self.num_gpus)


class ToolkitConfig(JobConfig):
    """A job of the toolkit. `{user}` in a text stands for the user of the launching account."""

    image: str = Field(min_length=1, description="container image")
    data: list[str] = Field([], description="mounts, as data:/path")
    environment_vars: list[str] = Field([], description="NAME=value; never a key or token")
    resources: ToolkitResources
    bid: int | None = Field(None, ge=0, description="highest bid, where jobs bid for resources")
    restartable: bool = Field(True, description="start again after a pre-emption; the job resumes by itself")
    preemptable: bool | None = Field(None, description="may be stopped for a job of higher priority")
    interactive: bool = Field(False, description="an interactive job; a batch of experiments is none")
    max_run_time: int | None = Field(None, ge=1, description="seconds after which the job is stopped")
    name: str | None = Field(None, description="<exp_id> and <time> are replaced")
    job_spec: dict[str, Any] = Field({}, description="further arguments of the client's JobSpec, unchecked")

    @field_validator("environment_vars", "job_spec")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        for name in _names(value):
            if SECRET.search(name):
                shown = name if name.isidentifier() else repr(name[:40])
                raise ValueError(
                    f"{shown} looks like a secret, and a job's specification is no place for one: "
                    "use ./copy_wandb_key.sh or `hf auth login`"
                )
        return value

    @property
    def num_gpus(self) -> int:
        return self.resources.gpu

    def spec(self, user: str) -> dict[str, Any]:
        """haven's `job_config`: what the client's `JobSpec` takes."""
        given = self.model_dump(exclude_none=True, exclude={"num_processes", "job_spec"}) | self.job_spec
        return _fill(given, user)


class SlurmConfig(JobConfig):
    """A job of Slurm; a key that is None is left to the cluster."""

    partition: str | None = Field(None, description="partition, or several: a,b")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    nodes: int = Field(1, ge=1, description="nodes; with more than one torchrun's ranks meet by themselves")
    gpus: int = Field(0, ge=0, description="GPUs on each node; they replace NGPUS in --python_binary")
    gpu_type: str | None = Field(None, description="such as a100")
    cpus: int | None = Field(None, ge=1, description="cores on each node")
    mem: str | None = Field(None, description="memory of each node, such as 64G")
    time: str | None = Field(None, description="time limit, such as 24:00:00 or 2-00:00:00")
    requeue: bool = Field(True, description="start again after a pre-emption; the job resumes by itself")
    save_seconds: int = Field(
        120,
        ge=0,
        description="seconds before the time limit at which the job saves and queues again; 0: never",
    )
    options: list[str] = Field([], description="further options of sbatch, such as --exclusive")

    @property
    def num_gpus(self) -> int:
        return self.gpus

    def spec(self) -> dict[str, Any]:
        """haven's `job_config`: the options of sbatch, the number of nodes among them."""
        gres = ":".join(filter(None, ["gpu", self.gpu_type, str(self.gpus)])) if self.gpus else None
        named = {
            "partition": self.partition,
            "qos": self.qos,
            "gres": gres,
            "cpus-per-task": self.cpus,
            "mem": self.mem,
            "time": self.time,
            "signal": f"TERM@{self.save_seconds}" if self.time and self.save_seconds else None,
        }
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        options.append("--requeue" if self.requeue else "--no-requeue")
        return {"nodes": self.nodes, "options": options + self.options}


CONFIGS: dict[str, type[ToolkitConfig] | type[SlurmConfig]] = {"toolkit": ToolkitConfig, "slurm": SlurmConfig}


def parse_job_config(
    scheduler: str, group: str | None, configs: dict[str, dict[str, Any]]
) -> ToolkitConfig | SlurmConfig:
    """The checked entry of `JOB_CONFIG` for a group, or its `default`; every fault is named in one `DsskError`."""
    if scheduler not in CONFIGS:
        raise DsskError(f"--job_scheduler is {scheduler}, want toolkit or slurm")
    if not isinstance(configs, dict):
        raise DsskError(
            f"JOB_CONFIG is a {type(configs).__name__}, want a dict of groups, see dssk/jobs/config.py"
        )
    name = group if group in configs else DEFAULT_GROUP
    if name not in configs:
        raise DsskError(
            f"JOB_CONFIG in job_configs.py has no entry for {group or 'a single --exp_id'} and no '{DEFAULT_GROUP}': "
            f"start from resources/job_configs_{scheduler}.py"
        )
    try:
        return CONFIGS[scheduler].model_validate(configs[name])
    except ValidationError as error:
        known = CONFIGS[scheduler].model_fields
        raise DsskError(f"JOB_CONFIG[{name!r}] for {scheduler}: {faults(error, known)}") from None


def toolkit_account(users: dict[str, str]) -> tuple[str, str]:
    """The launching account of the toolkit and the name of its user, from `EAI_ACCOUNT_ID`."""
    account = os.environ.get("EAI_ACCOUNT_ID")
    if not account:
        raise DsskError(
            "EAI_ACCOUNT_ID is not set: -j toolkit runs on a machine that is set up for the toolkit"
        )
    if account not in users:
        raise DsskError(
            f"account {account} is not in EAI_ACCOUNT_ID_TO_USER of job_configs.py: add "
            f'"{account}": "<your user name>"'
        )
    return account, users[account]


def _names(value: Any) -> Iterator[str]:
    """Every name in a value, however it is nested: keys, what stands before a text's `=`, and TEXTS_LIKE_THIS."""
    if isinstance(value, str):
        name, equals, _ = value.partition("=")
        if equals or VARIABLE.fullmatch(value):
            yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _names(inner)
    elif isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray):
        for inner in value:
            yield from _names(inner)
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"holds a {type(value).__name__}, want texts, numbers, lists and mappings")


def _is_printable(value: Any) -> bool:
    """Whether all texts in a value can be printed: no line ends, no null characters, no halves of surrogate pairs."""
    if isinstance(value, Mapping):
        return all(_is_printable(part) for pair in value.items() for part in pair)
    if isinstance(value, Sequence | Set) and not isinstance(value, str):
        return all(map(_is_printable, value))
    return value.isprintable() if isinstance(value, str) else True


def _fill(value: Any, user: str) -> Any:
    """`value` with the user's name in place of `{user}`, in all its texts."""
    if isinstance(value, str):
        return value.replace("{user}", user)
    if isinstance(value, list):
        return [_fill(item, user) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, user) for key, item in value.items()}
    return value
