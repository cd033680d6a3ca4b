"""Exact match and F1 of answers, as SQuAD defines them: pure functions on strings."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from dssk import prompts

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (Rajpurkar et al., 2016)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any of the answers after normalization, else 0.0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap of words with any of the answers: harmonic mean of precision and recall, 0 to 1."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def answer_class(answer: str) -> str:
    """`span`, `yes_no` or `unanswerable`, by the answer a row was given."""
    if answer in (prompts.YES, prompts.NO):
        return "yes_no"
    return "unanswerable" if answer == prompts.NOT_IN_CONTEXT else "span"
