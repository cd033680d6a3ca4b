"""The questions to score: rows of a store or of a raw data set, and the encoder states of their contexts.

A raw set's contexts are encoded as they are asked for, in batches, and rounded as a store would: the answers are
those that its store would give.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import xxhash
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dssk.data import schemas, sources
from dssk.data.distractors import context_numbers, members_of
from dssk.errors import DsskError
from dssk.inference.encoding import Encoder
from dssk.inference.loading import FusedModel, find_encode_layer, find_encoder
from dssk.inference.rounding import DEFAULT_STORAGE, encoding_bytes
from dssk.inference.tokenizer import tokenize_contexts
from dssk.models.shapes import context_window
from dssk.store.dataset import load_contexts, load_rows
from dssk.store.manifest import MANIFEST
from dssk.store.opening import check_model, load_manifest


@dataclass(frozen=True)
class Question:
    """One row to answer."""

    id: str
    question: str
    context: str
    answers: list[str]  # all acceptable ones; the first is the one a model learns


@dataclass(frozen=True)
class QuestionSet:
    """Questions with the states of their contexts; row numbers index `rows`."""

    rows: list[Question]
    context_tokens: list[int]  # of each row, as encoded
    fingerprint: str  # what tells these rows and encodings from others
    bytes_per_context_token: int  # of a stored encoding
    table: datasets.Dataset | None = None  # rows of a store with encoder_hidden_states
    pool: "ContextPool | None" = None  # where other contexts are drawn from, if they are
    context_ids: list[list[int]] | None = None  # of each row, where there is no store

    def __len__(self) -> int:
        return len(self.rows)

    def states(self, model: FusedModel, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Encoder states (S, d) of the contexts of some rows."""
        if self.table is not None:
            return [self.table[i]["encoder_hidden_states"] for i in numbers]
        assert self.context_ids is not None
        texts = [self.rows[i].context for i in numbers]
        return Encoder(model).encode(texts, input_ids=[self.context_ids[i] for i in numbers])


@dataclass(frozen=True)
class ContextPool:
    """All contexts of a split, those of questions that are not asked too, by number."""

    titles: Sequence[str]  # of the document of each
    text: Callable[[int], str]
    states: Callable[[FusedModel, Sequence[int]], list[torch.Tensor]]  # of some of them, (S, d) each
    members: Sequence[int]  # the numbers that belong to the split
    of_row: Sequence[int]  # the number of the context of each question that is asked


def load_questions(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    split: str | None = None,
    limit: int | None = None,
    makers: Mapping[str, sources.Maker] | None = None,
    with_pool: bool = False,
) -> QuestionSet:
    """The questions of a store, or of raw data that preprocessing could read (a file, a folder, a name on the Hub).

    `split` is `val` if not given; data that is not divided, or a store without rows there, is taken whole. At most
    `limit` rows are taken, spread evenly. `makers` make rows on the spot, by the name of their data set. Raises
    `DsskError` for a split that is not there and for rows of no known schema. `with_pool` makes all contexts of the
    split known.
    """
    if (Path(path) / MANIFEST).is_file():
        return _from_store(path, tokenizer, config, split, limit, with_pool)
    return _from_source(path, tokenizer, config, split, limit, makers or {}, with_pool)


def _from_store(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    split: str | None,
    limit: int | None,
    with_pool: bool,
) -> QuestionSet:
    tables = load_rows(path)
    split = split or ("val" if len(tables["val"]) else "train")
    if split not in tables:
        raise DsskError(f"{path} has no split {split}, it has {', '.join(tables)}")
    manifest = load_manifest(path)
    table = sample(tables[split], limit)
    names = ["id", "context", "question", "answer", "answers"]
    rows = [
        Question(row["id"], row["question"], row["context"], row["answers"] or [row["answer"]])
        for row in table.select_columns(names).to_list()
    ]
    if not rows:
        raise DsskError(f"{path} has no questions in its split {split}")
    fingerprint = _fingerprint(manifest.checksum, split, limit)
    if manifest.storage_dtype is None:
        pool = _pool_of_texts(tables[split]["context"], [], rows, tokenizer) if with_pool else None
        return _encoded_later(rows, tokenizer, config, fingerprint, pool)
    pool = _pool_of_store(path, tables[split], table) if with_pool else None
    lengths = [len(table[i]["encoder_hidden_states"]) for i in range(len(table))]
    num_bytes = encoding_bytes(manifest.storage_dtype, manifest.hidden_size)
    return QuestionSet(rows, lengths, fingerprint, num_bytes, table=table, pool=pool)


def _pool_of_store(path: str, whole: datasets.Dataset, asked: datasets.Dataset) -> ContextPool:
    contexts = load_contexts(path)
    titles = contexts.column("title")
    return ContextPool(
        titles,
        contexts.text,
        lambda model, numbers: [contexts.states(number) for number in numbers],
        members_of(whole, titles),
        context_numbers(asked).tolist(),
    )


def _pool_of_texts(
    texts: Sequence[str], titles: Sequence[str], asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> ContextPool:
    """Of the texts of all rows, and the titles of their documents, if they are known; encoded when they are read."""
    title_of = dict(zip(texts, titles or [""] * len(texts), strict=True))
    distinct = list(title_of)
    numbers = {text: number for number, text in enumerate(distinct)}
    return ContextPool(
        list(title_of.values()),
        distinct.__getitem__,
        lambda model, chosen: Encoder(model, tokenizer).encode([distinct[number] for number in chosen]),
        range(len(distinct)),
        [numbers[row.context] for row in asked],
    )


def _from_source(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    split: str | None,
    limit: int | None,
    makers: Mapping[str, sources.Maker],
    with_pool: bool,
) -> QuestionSet:
    source = sources.Source(path, makers=makers)
    found = source.open()
    name = split or ("val" if "val" in found else "all")
    if name not in found:
        raise DsskError(f"{path} has no split {name}, it has {', '.join(sorted(found))}")
    rows, titles = [], []
    for raw in found[name]:
        try:
            qa = schemas.to_qa(raw)
        except schemas.Dropped:
            continue
        except schemas.BadRow as error:
            raise DsskError(f"{raw.place}: {error}: mend or remove that row") from error
        rows.append(Question(qa.id, qa.question, qa.context, qa.answers))
        titles.append(qa.document)
    if not rows:
        raise DsskError(f"{path} has no usable row: want rows of context, question and answer")
    fingerprint = _fingerprint(source.describe(), name, limit)
    asked = [rows[i] for i in spread(len(rows), limit)]
    pool = _pool_of_texts([row.context for row in rows], titles, asked, tokenizer) if with_pool else None
    return _encoded_later(asked, tokenizer, config, fingerprint, pool)


def _encoded_later(
    rows: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    fingerprint: str,
    pool: ContextPool | None,
) -> QuestionSet:
    longest = context_window(config)
    ids = [tokens[:longest] for tokens in tokenize_contexts(tokenizer, [row.context for row in rows])]
    num_bytes = encoding_bytes(DEFAULT_STORAGE, config.states_width)
    lengths = [len(tokens) for tokens in ids]
    return QuestionSet(rows, lengths, fingerprint, num_bytes, pool=pool, context_ids=ids)


def _fingerprint(*facts: object) -> str:
    return xxhash.xxh3_128_hexdigest(repr(facts).encode())


def check_encodings(path: str, checkpoint: str | Path) -> None:
    """Raise `DsskError` unless the base of a checkpoint made the encodings at `path`; raw data suits every model."""
    if (Path(path) / MANIFEST).is_file():
        check_model(load_manifest(path), *find_encoder(checkpoint), find_encode_layer(checkpoint))


def sample(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows, spread evenly: the same ones every time."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(spread(len(rows), limit))


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `count`, spread evenly: the same ones every time."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def other_rows(contexts: Sequence[str]) -> list[int]:
    """For each row the nearest following row (cyclically) with another context.

    Raises `DsskError` if all contexts are the same: then there is no wrong context to give.
    """
    if len(set(contexts)) < 2:
        raise DsskError("all questions share one context: wrong_context needs at least two")
    count = len(contexts)
    return [
        next(j % count for j in range(i + 1, i + count) if contexts[j % count] != contexts[i])
        for i in range(count)
    ]


def other_questions(contexts: Sequence[str], questions: Sequence[str]) -> list[int | None]:
    """For each row the next row (cyclically) that asks another question of the same context, None if none does."""
    together: dict[str, list[int]] = {}
    for row, context in enumerate(contexts):
        together.setdefault(context, []).append(row)
    others: list[int | None] = []
    for row, context in enumerate(contexts):
        fellows = together[context]
        place = fellows.index(row)
        following = fellows[place + 1 :] + fellows[:place]
        others.append(next((other for other in following if questions[other] != questions[row]), None))
    return others
