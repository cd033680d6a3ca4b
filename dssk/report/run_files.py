"""What a run and a comparison left behind, as far as it is there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dssk.errors import DamagedData, DsskError

SYSTEM_NAMES = ("cross_attention", "prompted", "prompted_prefix_cache", "lora_prompted", "full_prompted")


@dataclass
class RunFiles:
    """The contents of a run's folder, and of a comparison's; what is absent is empty."""

    folder: Path
    experiment: dict[str, Any]  # exp_dict.json
    metrics: list[dict[str, Any]]  # metrics.jsonl
    scores: dict[str, Any]  # scores.json
    predictions: list[dict[str, Any]]  # predictions.jsonl, if it has answers from the right contexts
    table: list[dict[str, Any]] = field(default_factory=list)  # table.json of the comparison
    cost: list[dict[str, Any]] = field(default_factory=list)  # cost.json of the comparison

    @property
    def controls(self) -> dict[str, dict[str, Any]]:
        """The scores of each control, `with_context` and the others."""
        return {name: row for name, row in self.scores.items() if isinstance(row, dict) and "em" in row}


def find_run(path: str | Path) -> Path:
    """The run's folder for itself, for a folder in it, or for a folder that holds one run. Raises `DsskError`."""
    folder = Path(path).resolve()
    for candidate in (folder, folder.parent):
        if (candidate / "exp_dict.json").is_file():
            return candidate
    runs = [file.parent for file in sorted(folder.glob("*/exp_dict.json"))]
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise DsskError(f"{path} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no run at {path}: want the folder with exp_dict.json that trainval.py made")


def read_run(path: str | Path, comparison: str | Path | None = None) -> RunFiles:
    """Read a run's files, and those that `dssk.evaluation.compare` wrote to the folder `comparison`."""
    folder = find_run(path)
    run = RunFiles(
        folder=folder,
        experiment=_json(folder / "exp_dict.json", {}),
        metrics=_lines(folder / "metrics.jsonl", whole=False),
        scores=_json(folder / "scores.json", {}),
        predictions=[row for row in _lines(folder / "predictions.jsonl") if "with_context" in row],
    )
    if comparison is not None:
        if not (Path(comparison) / "table.json").is_file():
            raise DsskError(f"no table.json in {comparison}: want the --output of dssk.evaluation.compare")
        run.table = _json(Path(comparison) / "table.json", [])
        run.cost = _json(Path(comparison) / "cost.json", [])
    return run


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
