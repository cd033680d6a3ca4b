"""Two systems on the same questions: the difference of each question's scores says more than two intervals do."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from dssk.evaluation.scores import with_interval
from dssk.run_folder import check_row, read_rows


class _Scored(BaseModel):
    f1: float = Field(ge=0, le=1)


class _Answered(BaseModel):
    """What is read of a prediction."""

    id: str
    context: str
    with_context: _Scored


def f1_difference(file: Path, reference: Path) -> dict[str, float]:
    """`f1_difference`, and its 95 % interval: by how much F1 is higher in `file` than in `reference`.

    Both are files of predictions from the right contexts; only questions that stand in both count, and without any
    the result is empty. Raises `DamagedData` for a file that holds something else.
    """
    theirs = {row["id"]: row["with_context"]["f1"] for row in _answered(reference)}
    ours = [row for row in _answered(file) if row["id"] in theirs]
    if not ours:
        return {}
    return with_interval(
        "f1_difference", [row["with_context"]["f1"] - theirs[row["id"]] for row in ours], ours
    )


def _answered(file: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_rows(file) if "with_context" in row]
    for number, row in enumerate(rows, start=1):
        check_row(row, _Answered, f"{file} is damaged: answer {number}")
    return rows
