"""Finding contexts by their words: BM25 over indices that are kept in folders of their own, memory-mapped.

A library has one index for each of its segments, so that a change indexes what it writes and nothing else. Searching
several uses the document frequencies of all of them together, as one index of everything would; only the normalization
by a text's length uses the mean of its own index.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np

from dssk.utils.files import content_of

_WORD = r"\w+"  # by default bm25s leaves out words of one character, such as digits


class WordIndex:
    """A BM25 index of `count` texts."""

    def __init__(self, index: bm25s.BM25 | None, count: int, folder: Path = Path()):
        self._index = index  # None if the texts have no words
        self._count = count
        self._folder = folder  # that it was read from, if it was

    def __len__(self) -> int:
        """Texts."""
        return self._count

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> "WordIndex":
        words = bm25s.tokenize(list(texts), token_pattern=_WORD, show_progress=False) if texts else None
        if words is None or not words.vocab:
            return cls(None, len(texts))
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return cls(index, len(texts))

    @classmethod
    def load(cls, folder: Path) -> "WordIndex":
        """The index in a folder, of which only what a search needs is read."""
        with content_of(folder):
            index = bm25s.BM25.load(str(folder), mmap=True)
            return cls(index, int(index.scores["num_docs"]), folder)

    def save(self, folder: Path) -> None:
        """Write the index; nothing if there are no words."""
        if self._index is not None:
            self._index.save(str(folder))

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """`search` in this index alone."""
        return search([self], question, k)

    def matches(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the texts that have a word, and the scores that it gives them by this index alone."""
        number = None if self._index is None else self._index.vocab_dict.get(word)
        if self._index is None or number is None:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        with content_of(self._folder):
            start, end = self._index.scores["indptr"][number : number + 2]
            numbers, values = (self._index.scores[name][start:end] for name in ("indices", "data"))
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
                raise ValueError(f"it names text {numbers.max()} of {len(self)}")
            return numbers, values


def search(indices: Sequence[WordIndex], question: str, k: int) -> list[tuple[int, float]]:
    """Numbers of at most `k` texts that share words with `question`, best first, and their scores.

    Texts are numbered through all `indices`.
    """
    (words,) = bm25s.tokenize([question], token_pattern=_WORD, return_ids=False, show_progress=False)
    firsts = np.cumsum([0, *map(len, indices)])
    scores = np.zeros(firsts[-1], np.float32)
    for word in words:
        matches = [index.matches(word) for index in indices]
        weight = _idf(len(scores), sum(len(numbers) for numbers, _ in matches))
        for first, index, (numbers, values) in zip(firsts, indices, matches, strict=False):
            if len(numbers):
                scores[first + numbers] += values * np.float32(weight / _idf(len(index), len(numbers)))
    found = np.flatnonzero(scores)
    if len(found) > k:
        found = found[np.argpartition(-scores[found], k - 1)[:k]]
    best = found[np.lexsort((found, -scores[found]))]
    return [(int(number), float(scores[number])) for number in best]


def _idf(texts: int, having: int) -> float:
    """Inverse document frequency of a word that occurs in `having` of `texts`: Lucene's formula, bm25s' default."""
    return math.log(1 + (texts - having + 0.5) / (having + 0.5))
