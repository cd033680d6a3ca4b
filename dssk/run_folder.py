"""The folder of a run, `SAVEDIR_BASE/<experiment id>/`: every name in it, and the one reader of each.

    exp_dict.json               the experiment; written by training or, before it, by the submission of a job
    status.json                 how the run stands; written by training
    metrics.jsonl               all that was logged, an object a line; appended to by training
    checkpoint-N/, final/, best/    models, see `checkpoint.py`; written by training, `final` and `best` by its end
    wandb.json                  the run at Weights & Biases; written by training
    scores.json, predictions.jsonl  of the newest evaluation; also inside a model's folder
    report.html, report-*.png, attention.json   written by the report
    job_dict.json, job.sh, job_ended, code/, logs.txt, err.txt   of the run's job; written by its submission and itself

Beside it lie `.<experiment id>.lock`, which its one writer holds (`files.only_writer`), and `deleted/`, where a reset
moves it.
"""

import time
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dssk.checkpoint import FINAL, checkpoint_folder, checkpoint_folders, load_manifest
from dssk.config import experiment_id, faults
from dssk.errors import DamagedData, DsskError
from dssk.utils.files import machine_faults, write_json
from dssk.utils.json_files import read_json, read_objects

EXP_DICT = "exp_dict.json"
STATUS = "status.json"
METRICS = "metrics.jsonl"
WANDB = "wandb.json"
SCORES = "scores.json"
PREDICTIONS = "predictions.jsonl"
REPORT = "report.html"
ATTENTION = "attention.json"
JOB_DICT = "job_dict.json"
JOB_SCRIPT = "job.sh"
JOB_ENDED = "job_ended"
JOB_CODE = "code"
LOGS, ERRORS = "logs.txt", "err.txt"
DELETED = "deleted"

ID_DIGITS = 32


# --- finding ----------------------------------------------------------------------------------------------------


def find_run(path: str | Path) -> Path:
    """The run's folder, for itself or for a folder that holds this one run. Raises `DsskError` for any other."""
    folder = Path(path)
    if (folder / EXP_DICT).is_file():
        return folder
    runs = run_folders(folder)
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise DsskError(f"{path} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no run at {path}: want the folder with {EXP_DICT} that trainval.py made")


def run_folders(savedir_base: Path) -> list[Path]:
    """The folders of runs directly below `savedir_base`, by name."""
    return [file.parent for file in sorted(savedir_base.glob(f"*/{EXP_DICT}"))]


def newest_model(savedir: Path) -> Path | None:
    """The run's final model, else its newest finished checkpoint; nothing is verified."""
    folders = (savedir / FINAL, *checkpoint_folders(savedir))
    return next((folder for folder in folders if model_step(folder) is not None), None)


def model_step(folder: Path) -> int | None:
    """The optimizer step that a checkpoint or a fused model says it is of; None if it does not say."""
    try:
        return int(load_manifest(folder)["step"])
    except (DsskError, KeyError, TypeError, ValueError):
        return None


# --- the experiment ---------------------------------------------------------------------------------------------


def read_experiment(savedir: Path) -> dict[str, Any]:
    """The experiment of a run's folder, as it was written."""
    return read_json(savedir / EXP_DICT, dict)


def stored_experiment(savedir_base: Path, exp_id: str) -> dict[str, Any]:
    """The experiment that a job was submitted for; its content must still hash to its id."""
    if len(exp_id) != ID_DIGITS or any(c not in "0123456789abcdef" for c in exp_id):
        raise DsskError(f"--exp_id is {exp_id!r}, want {ID_DIGITS} hexadecimal digits")
    file = savedir_base / exp_id / EXP_DICT
    try:
        exp_dict = read_experiment(file.parent)
    except FileNotFoundError:
        raise DsskError(f"no experiment {exp_id} in {savedir_base}: {file} is missing") from None
    if experiment_id(exp_dict) != exp_id:
        raise DamagedData(f"{file} is not the experiment of id {exp_id}: it was changed after submission")
    return exp_dict


def write_experiment(savedir: Path, exp_dict: dict[str, Any]) -> None:
    """Keep the experiment in its run's folder; one that is there already must be the same."""
    if not (savedir / EXP_DICT).exists():
        write_json(savedir / EXP_DICT, exp_dict)
    elif changed := differences(read_experiment(savedir), exp_dict):
        raise DsskError(f"{savedir / EXP_DICT} is another experiment: {changed}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The keys whose values differ, with both values; empty if none does."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)


# --- what training and evaluation say ------------------------------------------------------------------------------


def read_status(savedir: Path) -> dict[str, Any]:
    """The last status that training wrote; empty before its start, and for a damaged file."""
    return _read_or_empty(savedir / STATUS)


def read_metrics(savedir: Path) -> list[dict[str, Any]]:
    """Everything that training logged, oldest first. A damaged line is left out: a measurement is lost, no more."""
    return split_metrics(savedir)[0]


def split_metrics(savedir: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of metrics.jsonl, and how many are damaged."""
    file = savedir / METRICS
    lines = list(read_objects(file)) if file.is_file() else []
    whole = [line for line in lines if line is not None and _is_step(line.get("step"))]
    return whole, len(lines) - len(whole)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_wandb(savedir: Path) -> dict[str, Any]:
    """Id, entity, project and name at Weights & Biases; empty if training logged to none."""
    stored = _read_if_there(savedir / WANDB)
    for key in ("id", "entity", "project", "name"):
        if not isinstance(stored.get(key), str | None):
            raise DamagedData(f"{savedir / WANDB} is damaged: {key} is {stored[key]!r}, want a text")
    return stored


def predictions_of(scores: Path) -> Path:
    """The predictions that go with a file of scores: `predictions-a.jsonl` with `a.json` or `scores-a.json`."""
    if scores.name == SCORES:
        return scores.with_name(PREDICTIONS)
    return scores.with_name(f"predictions-{scores.stem.removeprefix('scores-')}.jsonl")


def read_scores(folder: Path) -> dict[str, Any]:
    """The scores that an evaluation left in a run's or a model's folder; empty if there are none."""
    return checked_scores(_read_if_there(folder / SCORES), folder / SCORES)


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Scored(BaseModel):
    """What scores of some questions are made of; further keys are not looked at."""

    model_config = ConfigDict(strict=True)
    n: int | None = None
    em: Share | None = None
    em_low: Share | None = None
    em_high: Share | None = None
    f1: Share | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.em_low is None) != (self.em_high is None):
            raise ValueError("em_low and em_high stand together")
        return self


class _Bin(_Scored):
    low: float
    high: float


class Scored(_Scored):
    """The scores of a control."""

    by_class: dict[str, _Scored] = {}
    by_context_tokens: list[_Bin] = []


def checked_scores(scores: dict[str, Any], file: Path) -> dict[str, Any]:
    """The scores that `file` holds. Raises `DamagedData` if a control's are none."""
    for control, row in scores.items():
        if isinstance(row, dict):
            check_row(row, Scored, f"{file} is damaged: {control}")
    return scores


def check_row(row: dict[str, Any], kind: type[BaseModel], what: str) -> None:
    """Raise `DamagedData`, beginning with `what`, for a row that is not of a kind."""
    try:
        kind.model_validate(row)
    except ValidationError as error:
        raise DamagedData(f"{what}: {faults(error, kind.model_fields)}") from None


def newest_scores(savedir: Path) -> dict[str, Any]:
    """The scores of the run's newest model; empty if that was not evaluated, or they cannot be read."""
    newest = newest_model(savedir)
    try:
        return scores_of(newest) if newest else {}
    except DsskError:
        return {}


def scores_of(model: Path) -> dict[str, Any]:
    """The scores of a checkpoint or a fused model in a run's folder; empty if it was not evaluated.

    They may lie in the model's folder, in the run's or, as `final` is one of the checkpoints, in the other's. Scores
    say of which `step` they are; version 0.1's did not: they are of the model they lie in, in a run's folder of the
    final one.
    """
    savedir, step = model.parent, model_step(model)
    others = () if step is None else (savedir, checkpoint_folder(savedir, step), savedir / FINAL)
    for folder in (model, *others):
        implied = model_step(savedir / FINAL if folder == savedir else folder)
        if (scores := read_scores(folder)) and scores.get("step", implied) == step:
            return scores
    return {}


def read_answered(file: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The predictions from right contexts in a file of an evaluation. Raises `DamagedData` for one not of that kind."""
    answered = [row for row in read_rows(file) if "with_context" in row]
    for number, row in enumerate(answered, start=1):
        check_row(row, kind, f"{file} is damaged: answer {number}")
    return answered


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that was written at once, one a line; none if there is no file."""
    rows = []
    for number, row in enumerate(read_objects(file) if file.is_file() else (), 1):
        if row is None:
            raise DamagedData(f"{file} is damaged: line {number} holds no JSON object: evaluate again")
        rows.append(row)
    return rows


# --- jobs -------------------------------------------------------------------------------------------------------


def read_job(savedir: Path) -> dict[str, Any]:
    """haven's record of the run's job: id, command, scheduler; empty before its first submission."""
    return _read_if_there(savedir / JOB_DICT)


def last_lines(file: Path, count: int) -> list[str]:
    """The end of a log."""
    return file.read_text(errors="replace").splitlines()[-count:] if file.is_file() else ["no log yet"]


def move_aside(savedir: Path) -> None:
    """Move a run to `deleted/`, under a name of its own; nothing in there is ever erased."""
    if not savedir.exists():
        return
    deleted = savedir.parent / DELETED
    with machine_faults(deleted):
        deleted.mkdir(exist_ok=True)
        name = f"{savedir.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        number = len(list(deleted.glob(f"{name}*")))
        savedir.rename(deleted / (f"{name}-{number}" if number else name))


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file, dict) if file.is_file() else {}


def _read_or_empty(file: Path) -> dict[str, Any]:
    try:
        return _read_if_there(file)
    except DsskError:
        return {}
