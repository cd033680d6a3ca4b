"""Long texts as passages: each short enough to be encoded by itself, and ended where a sentence ends if one does.

A text that is short enough is one passage, as it is. The passages of a longer one may overlap, and each may begin with
the title of its document.
"""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dssk.errors import DsskError
from dssk.inference.tokenizer import encoded, tokenize_context

# Full stops, question and exclamation marks, closed or not, before white space; those of Chinese; and ends of lines.
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(?=\s)|\n|[。！？]")
LEAST_TOKENS = 16  # lower limit on the length of passages that can be asked for
SHORTEST_SHARE = 0.5  # of the allowed length: rather than a shorter passage, a sentence is cut


class Passage(NamedTuple):
    """A piece of a text: `text[start:end]`, after the title if that is repeated."""

    text: str
    start: int  # characters
    end: int


@dataclass(frozen=True)
class Splitter:
    """Cuts texts into passages of at most `tokens` tokens as they are encoded, prompt and title included.

    `overlap` is about how many tokens of a passage the next one repeats; it begins at a sentence where it can.
    """

    tokens: int
    overlap: int = 0
    repeat_title: bool = False

    def __post_init__(self) -> None:
        if self.tokens < LEAST_TOKENS:
            raise DsskError(f"passages of {self.tokens} tokens are too short: want at least {LEAST_TOKENS}")
        if not 0 <= self.overlap <= self.tokens // 2:
            raise DsskError(
                f"passages of {self.tokens} tokens overlap by {self.overlap}: want 0 to {self.tokens // 2}"
            )

    def split(self, tokenizer: PreTrainedTokenizerBase, text: str, title: str = "") -> list[Passage]:
        """The passages of a text in order. Raises `DsskError` for a title that leaves no room."""
        head = f"{title}\n" if self.repeat_title and title else ""
        if len(tokenize_context(tokenizer, head + text)) <= self.tokens:
            return [Passage(head + text, 0, len(text))]
        room = self.tokens - len(tokenize_context(tokenizer, head))
        if head and room < LEAST_TOKENS // 2:
            raise DsskError(f"the title {title[:40]!r} leaves no room in passages of {self.tokens} tokens")
        return [
            Passage(head + text[start:end], start, end)
            for start, end in self._spans(tokenizer, text, head, room)
        ]

    def _spans(
        self, tokenizer: PreTrainedTokenizerBase, text: str, head: str, room: int
    ) -> Iterator[tuple[int, int]]:
        offsets = encoded(tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
        starts = [start for start, _ in offsets] + [len(text)]
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        first = 0
        while first < len(starts) - 1:
            last = min(first + room, len(starts) - 1)
            end = _sentence_end(ends, starts[last], len(text), self._least(starts, first, last))
            while (
                over := len(tokenize_context(tokenizer, head + text[starts[first] : end])) - self.tokens
            ) > 0:
                least = _first_at(starts, starts[first] + 1)
                last = max(least, last - over)  # a piece has other tokens at its borders than the whole
                end = starts[last]
                if last == least:
                    break
            yield _trimmed(text, starts[first], end)
            if end == len(text):
                return
            first = self._next(starts, ends, first, end)

    @staticmethod
    def _least(starts: list[int], first: int, last: int) -> int:
        return starts[first + int((last - first) * SHORTEST_SHARE)]

    def _next(self, starts: list[int], ends: list[int], first: int, end: int) -> int:
        """The token that the next passage begins with."""
        after = _first_at(starts, end)
        if not self.overlap:
            return after
        earliest = max(_first_at(starts, starts[first] + 1), after - self.overlap)
        place = bisect.bisect_left(ends, starts[earliest])
        sentence = ends[place] if place < len(ends) and ends[place] < end else None
        return min(after, _first_at(starts, sentence)) if sentence is not None else earliest


def passages_of(
    splitter: Splitter | None, tokenizer: PreTrainedTokenizerBase, text: str, title: str = ""
) -> list[Passage]:
    """The passages of a text; without a splitter, where texts are cut off, it is one."""
    return [Passage(text, 0, len(text))] if splitter is None else splitter.split(tokenizer, text, title)


def _sentence_end(ends: list[int], limit: int, length: int, least: int) -> int:
    """The last end of a sentence in a text's part up to `limit`, or that where the part would be too short."""
    if limit == length:
        return limit
    place = bisect.bisect_right(ends, limit) - 1
    return ends[place] if place >= 0 and ends[place] >= least else limit


def _first_at(starts: list[int], character: int) -> int:
    """The first token that begins at a character or after it."""
    return bisect.bisect_left(starts, character)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())
