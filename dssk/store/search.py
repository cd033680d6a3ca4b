"""Finding contexts by their words: a BM25 index in a folder of its own, memory-mapped."""

from collections.abc import Sequence
from pathlib import Path

import bm25s

from dssk.utils.files import content_of

_WORD = r"\w+"  # by default bm25s leaves out words of one character, such as digits


class WordIndex:
    """Which texts have which words. Empty where there are none."""

    def __init__(self, index: bm25s.BM25 | None, folder: Path = Path()):
        self._index = index
        self._folder = folder  # that it was read from, if it was

    def __len__(self) -> int:
        """Texts."""
        return 0 if self._index is None else int(self._index.scores["num_docs"])

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> "WordIndex":
        if not texts:
            return cls(None)
        words = bm25s.tokenize(list(texts), token_pattern=_WORD, show_progress=False)
        if not words.vocab:
            return cls(None)
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return cls(index)

    @classmethod
    def load(cls, folder: Path) -> "WordIndex":
        """The index in a folder, of which only what a search needs is read."""
        with content_of(folder):
            index = cls(bm25s.BM25.load(str(folder), mmap=True), folder)
            len(index)
        return index

    def save(self, folder: Path) -> None:
        """Write the index; nothing if it is empty."""
        if self._index is not None:
            self._index.save(str(folder))

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """Numbers of at most `k` texts that share words with `question`, best first, and their scores."""
        (words,) = bm25s.tokenize([question], token_pattern=_WORD, return_ids=False, show_progress=False)
        with content_of(self._folder):
            if self._index is None or not any(word in self._index.vocab_dict for word in words):
                return []
            rows, scores = self._index.retrieve([words], k=min(k, len(self)), show_progress=False)
            return [
                (int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if score > 0
            ]
