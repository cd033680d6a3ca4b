"""The best evaluation of a run, and how many evaluations have come since."""

from typing import Any

History = list[dict[str, Any]]  # what transformers' TrainerState keeps of all that was logged


def evaluations(history: History) -> History:
    """The evaluations in a history, oldest first."""
    return [entry for entry in history if "eval_loss" in entry]


def best_evaluation(history: History) -> dict[str, Any] | None:
    """The evaluation of the highest F1, among equals (or if one has no F1) of the lowest loss; the first of equals."""
    seen = evaluations(history)
    answered = all("eval_f1" in entry for entry in seen)
    return max(seen, key=lambda e: (e["eval_f1"] if answered else 0.0, -e["eval_loss"]), default=None)


def evaluations_since_best(history: History) -> int:
    """How many evaluations came after the best one."""
    seen = evaluations(history)
    best = best_evaluation(history)
    return 0 if best is None else len(seen) - 1 - seen.index(best)


def is_exhausted(history: History, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row have been no better than one before them; None: never."""
    return patience is not None and evaluations_since_best(history) >= patience
