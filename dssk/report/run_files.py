"""The files of a run and of a comparison, as far as they exist."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dssk.errors import DamagedData, DsskError
from dssk.evaluation import by_number
from dssk.models.configuration import CHOICES
from dssk.run_folder import (
    PREDICTIONS,
    SCORES,
    Scored,
    Share,
    check_row,
    checked_scores,
    find_run,
    read_answered,
    read_experiment,
    read_metrics,
    read_scores,
)
from dssk.utils.json_files import read_json


class Part(BaseModel):
    """What the report shows of the scores of some questions."""

    n: int
    em: Share


class PartByLength(Part):
    """The same, of contexts with so many tokens."""

    low: float
    high: float


class Control(Part):
    """What it shows of a control."""

    f1: Share
    by_class: dict[str, Part] = {}
    by_context_tokens: list[PartByLength] = []


class OfNumber(Scored):
    """What it shows of the questions that read so many contexts."""

    em: Share
    em_low: Share
    em_high: Share


class Prediction(BaseModel):
    """What it shows of an answer."""

    prediction: str


class Answered(BaseModel):
    """What it shows of a question that was answered."""

    question: str
    context: str
    answers: list[str]
    with_context: Prediction


class OfAll(BaseModel):
    """What it shows of scores that are no control's."""

    right_beats_wrong: Share = 0.0


class Compared(Scored):
    """What the report shows of a row of a comparison."""

    system: str
    data: str | None = None
    answer_nll: float | None = None
    trained_parameters: int | None = None
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    bytes_per_context_token: float | None = None
    settings: dict[str, Any] = {}


class ComparedByNumber(Compared, OfNumber):
    """The same, where questions read so many contexts."""

    num_contexts: int
    gold: bool


@dataclass
class RunFiles:
    """The contents of a run's folder, and of a comparison's; what is absent is empty."""

    folder: Path
    experiment: dict[str, Any]  # exp_dict.json
    metrics: list[dict[str, Any]]  # metrics.jsonl
    scores: dict[str, Any]  # scores.json, or those of the comparison
    predictions: list[dict[str, Any]]  # likewise, of predictions.jsonl, with answers from the right contexts
    table: list[dict[str, Any]] = field(default_factory=list)  # table.json of the comparison
    together: list[dict[str, Any]] = field(default_factory=list)  # its rows by number of contexts, of one set
    cost: list[dict[str, Any]] = field(default_factory=list)  # cost.json of the comparison
    data: str = ""  # the comparison's set of questions that `scores` and `predictions` are of

    @property
    def controls(self) -> dict[str, dict[str, Any]]:
        """The scores of each control, `with_context` and the others."""
        return {
            name: row
            for name, row in self.scores.items()
            if isinstance(row, dict) and "em" in row and not by_number.is_name(name)
        }

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The scores by number of contexts, see `by_number.rows`: the comparison's, of every system, if it has any."""
        return self.together or by_number.rows(self.scores, self.data, 0)


def read_run(path: str | Path, comparison: str | Path | None = None, data: str | None = None) -> RunFiles:
    """Read a run's files, and those that `dssk compare` wrote to the folder `comparison`.

    `data` names one of the comparison's sets of questions: then, or if the run has not been scored by itself, scores
    and predictions are the comparison's (of its first set if `data` is not given).
    """
    folder = find_run(path)
    run = RunFiles(
        folder=folder,
        experiment=read_experiment(folder),
        metrics=read_metrics(folder),
        scores=_shown(read_scores(folder), folder / SCORES),
        predictions=read_answered(folder / PREDICTIONS, Answered),
    )
    if comparison is None:
        if data is not None:
            raise DsskError(f"--data {data} names a set of questions of a comparison: want --compare as well")
        return run
    compared = Path(comparison)
    if not (compared / "table.json").is_file():
        raise DsskError(f"no table.json in {comparison}: want the --output of dssk compare")
    table = _rows(compared / "table.json")
    run.table = [row for row in table if "num_contexts" not in row]
    run.cost = _rows(compared / "cost.json")
    sets = list(dict.fromkeys(str(row["data"]) for row in run.table if row.get("data")))
    if data is not None and data not in sets:
        raise DsskError(f"--data {data} is none of the comparison's sets of questions: {', '.join(sets)}")
    first = sets[0] if sets else None
    run.together = [row for row in table if "num_contexts" in row and row.get("data") == (data or first)]
    if sets and (data is not None or not run.scores):
        run.data = data or sets[0]
        names, readers = [row.get("system") for row in run.table], CHOICES["reader"]
        label = f"{run.data}-{next((name for name in readers if name in names), readers[0])}"
        file = compared / f"scores-{label}.json"
        scores = read_json(file, dict).get("scores", {}) if file.is_file() else {}
        run.scores = _shown(checked_scores(scores, file), file)
        run.predictions = read_answered(compared / f"predictions-{label}.jsonl", Answered)
    return run


def _shown(scores: dict[str, Any], file: Path) -> dict[str, Any]:
    """The scores that `file` holds. Raises `DamagedData` if there is something that cannot be shown."""
    check_row(scores, OfAll, f"{file} is damaged")
    for name, row in scores.items():
        if isinstance(row, dict) and "em" in row:
            kind = OfNumber if by_number.is_name(name) else Control
            check_row(row, kind, f"{file} is damaged: {name}")
    return scores


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = read_json(file, list) if file.is_file() else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DamagedData(f"{file} is damaged: it holds something that is no JSON object")
        kind = ComparedByNumber if "num_contexts" in row else Compared
        check_row(row, kind, f"{file} is damaged: row {number}")
    return rows
