"""Two systems on the same questions: the difference of each question's scores says more than two intervals do."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from dssk.evaluation.scores import Prediction, with_interval
from dssk.run_folder import read_answered


class _Scored(BaseModel):
    f1: float = Field(ge=0, le=1)


class _Answered(BaseModel):
    """What is read of a prediction."""

    id: str
    context: str
    with_context: _Scored


def read(file: Path) -> list[Prediction]:
    """The predictions from right contexts in a file. Raises `DamagedData` if it holds something else."""
    return read_answered(file, _Answered)


def f1_difference(predictions: Sequence[Prediction], reference: Sequence[Prediction]) -> dict[str, float]:
    """`f1_difference`, and its 95 % interval: by how much F1 is higher than in `reference`.

    Only questions that both have answered count; without any the result is empty.
    """
    theirs = {row["id"]: row["with_context"]["f1"] for row in reference}
    ours = [row for row in predictions if row["id"] in theirs]
    if not ours:
        return {}
    return with_interval(
        "f1_difference", [row["with_context"]["f1"] - theirs[row["id"]] for row in ours], ours
    )
