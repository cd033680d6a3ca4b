"""Predictions -> scores: means over all questions, by class of answer and by length of context, with intervals.

A prediction is a line of predictions.jsonl, see docs/evaluation.md. Questions about one context are not independent
of each other, so the intervals resample contexts.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

DRAWS = 1000
LENGTH_BINS = 5
Prediction = dict[str, Any]


def score(predictions: Sequence[Prediction], controls: Sequence[str]) -> dict[str, Any]:
    """The content of scores.json. A control is scored on the questions that have a prediction under it."""
    scores: dict[str, Any] = {}
    for control in controls:
        if answered := [p for p in predictions if control in p]:
            scores[control] = score_control(answered, control)
    compared = [p for p in predictions if "with_context" in p and "wrong_context" in p]
    if compared:
        beats = [p["with_context"]["answer_nll"] < p["wrong_context"]["answer_nll"] for p in compared]
        scores |= with_interval("right_beats_wrong", beats, compared)
    return scores


def score_control(predictions: Sequence[Prediction], control: str) -> dict[str, Any]:
    """The scores of at least one prediction under one control."""
    spans = [p[control]["em"] for p in predictions if p["answer_class"] == "span"]
    return {
        "n": len(predictions),
        **with_interval("em", _values(predictions, control, "em"), predictions),
        **with_interval("f1", _values(predictions, control, "f1"), predictions),
        "rouge_l": _mean(_values(predictions, control, "rouge_l")),
        "span_em": _mean(spans) if spans else None,
        "answer_nll": None if None in (nll := _values(predictions, control, "answer_nll")) else _mean(nll),
        "by_class": _by_class(predictions, control),
        "by_context_tokens": _by_context_tokens(predictions, control),
    }


def interval(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`, resampling whole groups (numbered from 0)."""
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)


def with_interval(name: str, values: Sequence[float], predictions: Sequence[Prediction]) -> dict[str, float]:
    """The mean of `values`, one for each prediction, under a name, and its 95 % interval."""
    low, high = interval(values, _groups(predictions))
    return {name: _mean(values), f"{name}_low": low, f"{name}_high": high}


def _groups(predictions: Sequence[Prediction]) -> list[int]:
    """The number of each prediction's context, counted from 0 by first appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(p["context"], len(numbers)) for p in predictions]


def _by_class(predictions: Sequence[Prediction], control: str) -> dict[str, Any]:
    classes = sorted({p["answer_class"] for p in predictions})
    return {
        name: {
            "n": len(chosen),
            "em": _mean(_values(chosen, control, "em")),
            "f1": _mean(_values(chosen, control, "f1")),
        }
        for name in classes
        if (chosen := [p for p in predictions if p["answer_class"] == name])
    }


def _by_context_tokens(predictions: Sequence[Prediction], control: str) -> list[dict[str, Any]]:
    """Bins of about equally many questions; `low` and `high` tokens both lie inside."""
    lengths = np.array([p["context_tokens"] for p in predictions])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)).round().astype(int))
    bins = []
    for number, high in enumerate(edges[1:] if len(edges) > 1 else edges):
        low = edges[0] if number == 0 else edges[number] + 1
        chosen = [p for p, length in zip(predictions, lengths, strict=True) if low <= length <= high]
        if chosen:
            values = _values(chosen, control, "em")
            row = {"low": int(low), "high": int(high), "n": len(chosen)}
            row |= with_interval("em", values, chosen)  # type: ignore[arg-type]
            bins.append({**row, "f1": _mean(_values(chosen, control, "f1"))})
    return bins


def _values(predictions: Sequence[Prediction], control: str, name: str) -> list[float]:
    return [p[control][name] for p in predictions]


def _mean(values: Sequence[float]) -> float:
    return round(mean(values), 4)


def table(scores: dict[str, Any]) -> str:
    """The scores as a small table for a terminal."""
    lines = [f"{'':16}{'EM':>7}{'95 %':>16}{'F1':>8}{'ROUGE-L':>9}{'span EM':>9}{'answer NLL':>12}{'n':>7}"]
    for control, row in scores.items():
        if not isinstance(row, dict):
            continue
        span = "-" if row["span_em"] is None else f"{row['span_em']:.3f}"
        em_range = f"{row['em_low']:.3f}..{row['em_high']:.3f}"
        lines.append(
            f"{control:16}{row['em']:7.3f}{em_range:>16}{row['f1']:8.3f}{row['rouge_l']:9.3f}{span:>9}"
            f"{row['answer_nll']:12.3f}{row['n']:7}"
        )
    if "right_beats_wrong" in scores:
        share, low, high = (scores[f"right_beats_wrong{end}"] for end in ("", "_low", "_high"))
        lines.append(f"gold answer likelier with its own context: {share:.1%} ({low:.1%}..{high:.1%})")
    for control, row in scores.items():
        if isinstance(row, dict) and "first_token_s" in row:
            beats = (
                f", gold answer likelier so {row['right_beats_wrong']:.1%}"
                if "right_beats_wrong" in row
                else ""
            )
            lines.append(
                f"{control}: first token {row['first_token_s']:.3f} s, then {row['tokens_per_s']:.1f} tokens a second, "
                f"{row['bytes']:,} bytes kept{beats}"
            )
    return "\n".join(lines)
