"""Scores of one answer against its gold answers: exact match and F1 as SQuAD defines them, and ROUGE-L.

Pure functions on strings; every score lies between 0 and 1 and the best of several gold answers counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from dssk import prompts

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

AnswerClass = Literal["span", "yes_no", "unanswerable"]


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (Rajpurkar et al., 2016)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any of the answers after normalization, else 0.0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap of words with any of the answers: harmonic mean of precision and recall."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """The best ROUGE-L of any answer (Lin, 2004): as `f1`, but only words in the same order count as common."""
    return max(_rouge_l(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _rouge_l(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * _longest_common_subsequence(predicted, gold) / (len(predicted) + len(gold))


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Its length. `best[j]` is that of what was seen of `first` and the first j words of `second`."""
    best = [0] * (len(second) + 1)
    for word in first:
        before = best[:]
        for j, other in enumerate(second):
            best[j + 1] = before[j] + 1 if word == other else max(before[j + 1], best[j])
    return best[-1]


def answer_class(answer: str) -> AnswerClass:
    """The kind of answer that a row was given."""
    if answer in (prompts.YES, prompts.NO):
        return "yes_no"
    return "unanswerable" if answer == prompts.NOT_IN_CONTEXT else "span"
