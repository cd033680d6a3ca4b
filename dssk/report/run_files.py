"""What a run and a comparison left behind, as far as it is there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dssk.errors import DamagedData, DsskError


@dataclass
class RunFiles:
    """The contents of a run's folder, and of a comparison's; what is absent is empty."""

    folder: Path
    experiment: dict[str, Any]  # exp_dict.json
    metrics: list[dict[str, Any]]  # metrics.jsonl
    scores: dict[str, Any]  # scores.json, or those of the comparison
    predictions: list[
        dict[str, Any]
    ]  # likewise predictions.jsonl, where it has answers from the right contexts
    table: list[dict[str, Any]] = field(default_factory=list)  # table.json of the comparison
    cost: list[dict[str, Any]] = field(default_factory=list)  # cost.json of the comparison
    data: str = ""  # the comparison's set of questions that `scores` and `predictions` are of

    @property
    def controls(self) -> dict[str, dict[str, Any]]:
        """The scores of each control, `with_context` and the others."""
        return {name: row for name, row in self.scores.items() if isinstance(row, dict) and "em" in row}


def find_run(path: str | Path) -> Path:
    """The run's folder, for itself or for a folder that holds this one run. Raises `DsskError` for any other."""
    folder = Path(path)
    if (folder / "exp_dict.json").is_file():
        return folder
    runs = [file.parent for file in sorted(folder.glob("*/exp_dict.json"))]
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise DsskError(f"{path} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no run at {path}: want the folder with exp_dict.json that trainval.py made")


def read_run(path: str | Path, comparison: str | Path | None = None, data: str | None = None) -> RunFiles:
    """Read a run's files, and those that `dssk compare` wrote to the folder `comparison`.

    `data` names one of the comparison's sets of questions: then, or if the run has not been scored by itself, scores
    and predictions are the comparison's (of its first set if `data` is not given).
    """
    folder = find_run(path)
    run = RunFiles(
        folder=folder,
        experiment=_json(folder / "exp_dict.json", {}),
        metrics=_lines(folder / "metrics.jsonl", whole=False),
        scores=_json(folder / "scores.json", {}),
        predictions=_answered(folder / "predictions.jsonl"),
    )
    if comparison is None:
        if data is not None:
            raise DsskError(f"--data {data} names a set of questions of a comparison: want --compare as well")
        return run
    compared = Path(comparison)
    if not (compared / "table.json").is_file():
        raise DsskError(f"no table.json in {comparison}: want the --output of dssk compare")
    run.table = _json(compared / "table.json", [])
    run.cost = _json(compared / "cost.json", [])
    sets = list(dict.fromkeys(str(row["data"]) for row in run.table if row.get("data")))
    if data is not None and data not in sets:
        raise DsskError(f"--data {data} is none of the comparison's sets of questions: {', '.join(sets)}")
    if sets and (data is not None or not run.scores):
        run.data = data or sets[0]
        label = f"{run.data}-cross_attention"
        run.scores = _json(compared / f"scores-{label}.json", {}).get("scores", {})
        run.predictions = _answered(compared / f"predictions-{label}.jsonl")
    return run


def _answered(file: Path) -> list[dict[str, Any]]:
    return [row for row in _lines(file) if "with_context" in row]


def _json(file: Path, default: Any) -> Any:
    if not file.is_file():
        return default
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise DamagedData(f"{file} is damaged ({error}): make it again") from error
    if not isinstance(value, type(default)):
        raise DamagedData(
            f"{file} holds {type(value).__name__}, want {type(default).__name__}: make it again"
        )
    return value


def _lines(file: Path, whole: bool = True) -> list[dict[str, Any]]:
    """The objects of a JSONL file; unless it must be `whole`, its last line may be torn."""
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if not whole and number == len(lines):
                break
            raise DamagedData(f"{file}, line {number}, is damaged ({error}): make it again") from error
    return values
