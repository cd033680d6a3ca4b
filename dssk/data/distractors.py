"""Distractors: contexts of other questions, which a question reads beside its own.

They come from the question's document, or from other documents: contexts that share most words with the question (hard
ones), any (easy ones), or those of the other questions of a training batch, which are as easy and cost nothing, as they
are loaded and projected anyway (in-batch negatives, as in Dense Passage Retrieval, arXiv 2004.04906).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import datasets
import numpy as np

from dssk.config import Source, TrainingSource
from dssk.errors import DsskError
from dssk.store.dataset import StoredContexts
from dssk.store.search import WordIndex

NEIGHBOURS = 20  # found for a question, of which some are drawn
TRIES = 20  # draws of a random context before there is taken to be none left

BATCH = "batch"


class Distractors:
    """Contexts by number, and draws among some of them. What is drawn depends on the arguments alone.

    Raises `DsskError` for the source `document` where no context has a title.

    Args:
        titles: the title of each context's document; one without is a document by itself.
        text: gives the text of a context by its number.
        members: the numbers that are drawn from.
        mix: how often each source is drawn from, in any unit. One that has no context left gives way to `random`.
    """

    def __init__(
        self,
        titles: Sequence[str],
        text: Callable[[int], str],
        members: Sequence[int],
        mix: Mapping[Source, float] | Mapping[TrainingSource, float],
    ):
        if mix.get("document") and not any(titles):
            raise DsskError(
                "distractors of the same document: the data do not say which contexts are of one. Preprocess them "
                "again, or draw neighbours and random ones"
            )
        weights = np.array(list(mix.values()), dtype=float)
        self._sources, self._shares = list(mix), weights / weights.sum()
        self.text, self.members = text, np.asarray(members)
        named = np.array([bool(title) for title in titles])
        alone = np.arange(len(titles)) + len(titles)
        self._documents = np.where(named, np.unique(titles, return_inverse=True)[1], alone)
        self._by_document = self.members[np.argsort(self._documents[self.members], kind="stable")]
        self._ordered = self._documents[self._by_document]
        self._found: dict[str, list[int]] = {}

    @classmethod
    def of_split(
        cls, rows: datasets.Dataset, contexts: StoredContexts, mix: Mapping[TrainingSource, float]
    ) -> "Distractors":
        """Those of a split of `load_rows`: the contexts of its questions, and all others of their documents."""
        titles = contexts.column("title")
        return cls(titles, contexts.text, members_of(rows, titles), mix)

    def draw(
        self,
        own: int,
        question: str,
        count: int,
        rng: np.random.Generator,
        without: Sequence[str] = (),
        batch: Sequence[int] = (),
    ) -> list[int]:
        """At most `count` distinct contexts beside number `own`, fewer if there are no more.

        None in which one of the texts `without` stands, in any case. `batch` are those of the source of that name.
        """
        chosen: list[int] = []
        unwanted = [text.lower() for text in without]

        def fits(number: int) -> bool:
            if number in chosen or number == own:
                return False
            return not unwanted or not any(text in self.text(number).lower() for text in unwanted)

        for place in rng.choice(len(self._sources), size=count, p=self._shares):
            for source in dict.fromkeys((self._sources[place], "random")):
                if (drawn := self._one(source, own, question, batch, rng, fits)) is not None:
                    chosen.append(drawn)
                    break
        return chosen

    def _one(
        self,
        source: str,
        own: int,
        question: str,
        batch: Sequence[int],
        rng: np.random.Generator,
        fits: Callable[[int], bool],
    ) -> int | None:
        if source == "random":
            drawn = rng.choice(self.members, size=TRIES).tolist()
            return next((n for n in self._of_others(drawn, own) if fits(n)), None)
        if source == "document":
            numbers: Iterable[int] = self._same_document(own)
        else:
            numbers = self._of_others(batch if source == BATCH else self._neighbours(question), own)
        found = [number for number in numbers if fits(number)]
        return found[rng.integers(len(found))] if found else None

    def _same_document(self, own: int) -> list[int]:
        low, high = (np.searchsorted(self._ordered, self._documents[own], side) for side in ("left", "right"))
        return self._by_document[low:high].tolist()

    def _of_others(self, numbers: Sequence[int], own: int) -> Iterator[int]:
        """Those of these contexts that belong to another document."""
        return (number for number in numbers if self._documents[number] != self._documents[own])

    def _neighbours(self, question: str) -> list[int]:
        if question not in self._found:
            self._found[question] = [
                int(self.members[place]) for place, _ in self._index.search(question, NEIGHBOURS)
            ]
        return self._found[question]

    @cached_property
    def _index(self) -> WordIndex:
        return WordIndex.of_texts([self.text(number) for number in self.members.tolist()])


def members_of(rows: datasets.Dataset, titles: Sequence[str]) -> list[int]:
    """The contexts of the questions of a split, and all others of their documents."""
    asked = set(context_numbers(rows).tolist())
    documents = {titles[number] for number in asked} - {""}
    return [number for number, title in enumerate(titles) if number in asked or title in documents]


def context_numbers(rows: datasets.Dataset) -> np.ndarray:
    """The number of each row's context in its store."""
    column = rows.with_format("arrow").select_columns(["encoder_hidden_states"])[:]["encoder_hidden_states"]
    return column.to_numpy()
