"""Heuristic baselines, which answer without a model.

An entity is a run of words that begin with a capital letter or a digit. HTML tags, which some data sets leave in
their contexts, are no words.
"""

import re
from collections.abc import Sequence

import numpy as np

from dssk.evaluation.metrics import normalize
from dssk.evaluation.predictions import ByControl
from dssk.evaluation.questions import Question, QuestionSet

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w+(?:[-'’.,]\w+)*|[^\w\s]")
# Capitalized at the head of a sentence only, and in too many questions to tell sentences apart.
_FUNCTION_WORDS = """
    a an the this that these those there it he she they we you i his her its their in on at as of to by for from with
    and or but if when while after before during since until because although many most some all one both each
    who whom whose what which where why how is are was were be been did do does has have had not
"""
_SKIPPED = frozenset(_FUNCTION_WORDS.split())


class HeuristicSystem:
    """`random_entity`: any entity of the context. `overlap`: the first entity, not in the question, of the sentence
    that shares most words with the question.
    """

    def __init__(self, name: str, questions: QuestionSet):
        self.answer = {"random_entity": random_entity, "overlap": overlap}[name]
        self.questions = questions

    def __call__(self, rows: list[int]) -> list[ByControl]:
        return [{"with_context": (self.answer(self.questions.rows[row], row), None)} for row in rows]


def random_entity(asked: Question, seed: int) -> str:
    """An entity of the context; the same for the same seed."""
    return _any(entities(asked.context), seed)


def overlap(asked: Question, seed: int) -> str:
    """The first entity of the best sentence that names one which the question does not."""
    words = _content_words(asked.question)
    sentences = _SENTENCE_END.split(_without_tags(asked.context))
    for sentence in sorted(sentences, key=lambda s: -len(words & _content_words(s))):
        for entity in entities(sentence):
            if not _content_words(entity) <= words:
                return entity
    return random_entity(asked, seed)


def entities(text: str) -> list[str]:
    """Every entity of a text, in order."""
    found: list[list[str]] = [[]]
    for word in _WORD.findall(_without_tags(text)):
        if (word[0].isupper() or word[0].isdigit()) and not (not found[-1] and word.lower() in _SKIPPED):
            found[-1].append(word)
        elif found[-1]:
            found.append([])
    return [" ".join(words) for words in found if words]


def _without_tags(text: str) -> str:
    return _TAG.sub(" | ", text)  # what a tag divides is not one entity


def _content_words(text: str) -> set[str]:
    return set(normalize(text).split()) - _SKIPPED


def _any(texts: Sequence[str], seed: int) -> str:
    return texts[int(np.random.default_rng(seed).integers(len(texts)))] if texts else ""
