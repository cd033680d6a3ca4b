"""From raw rows to a plan: the question tables, and every distinct context as tokens, cut into fixed shards.

Two passes keep memory flat. The first reads the source once and stages sound rows on the disk. The second divides
train from val, drops what is double, and numbers the contexts. Inside a shard contexts are ordered by length, longest
first, so that batches of consecutive rows need little padding and the worst case for memory comes first.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import xxhash
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dssk.data.readers import BadRow, RawRow
from dssk.data.schemas import Dropped, UnknownFields, to_qa
from dssk.errors import DamagedData, DsskError
from dssk.inference.passages import Passage, Splitter, passages_of
from dssk.inference.tokenizer import tokenize_contexts
from dssk.store.dataset import QUESTION_FEATURES, write_dataset_files
from dssk.store.manifest import (
    HISTOGRAM_BIN_TOKENS,
    SPLITS,
    Checked,
    Counts,
    FileInfo,
    Settings,
    Strict,
    shard_name,
)
from dssk.store.opening import verified
from dssk.store.segments import write_table
from dssk.utils import files

STAGING = ".staging"
PLAN = "plan.json"
CONTEXT_TOKENS = "contexts.arrow"

_BATCH_ROWS = 1000
_WORD = re.compile(r"\w+")
_SHOWN_BAD_ROWS = 5
_ROW_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "document", "context", "question")]
    + [("answers", pa.list_(pa.string())), ("start", pa.int64()), ("end", pa.int64())]
)
_CONTEXT_SCHEMA = pa.schema(
    [
        ("title", pa.string()),
        ("context", pa.string()),
        ("document", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)


class PlannedShard(Strict):
    """The contents of a shard that is still to be encoded; `key` as in `ShardInfo`."""

    key: str
    first_row: int
    rows: int
    tokens: int


class Plan(Checked):
    """A store whose texts are complete and whose contexts are still to be encoded."""

    settings: Settings
    counts: Counts
    shards: list[PlannedShard]
    tables: dict[str, FileInfo]
    """The files of `train/` and `val/`, by path relative to the store."""
    context_tokens: FileInfo


class Tally:
    """Counts of what happens to rows on their way."""

    def __init__(self, max_bad_rows: int):
        self.read = 0
        self.num_bad_rows = 0
        self.dropped: Counter[str] = Counter()
        self.max_bad_rows = max_bad_rows
        self.has_unknown_fields = False
        self._places: dict[str, list[str]] = {}

    def add_bad_row(self, place: str, fault: BadRow) -> None:
        self.num_bad_rows += 1
        self.has_unknown_fields |= isinstance(fault, UnknownFields)
        if self.num_bad_rows <= max(self.max_bad_rows, _SHOWN_BAD_ROWS):  # a file may be nothing but these
            self._places.setdefault(str(fault), []).append(place)

    @property
    def bad_rows(self) -> list[str]:
        """Place and fault of each, as far as they are allowed."""
        return [f"{place}: {fault}" for fault, places in self._places.items() for place in places]

    def check(self, name: str) -> None:
        """Raise `DsskError` if more rows than allowed were malformed."""
        if self.num_bad_rows <= self.max_bad_rows:
            return
        shown = dict(islice(self._places.items(), _SHOWN_BAD_ROWS))
        faults = "; ".join(
            f"{', '.join(places[:_SHOWN_BAD_ROWS])}: {fault}" for fault, places in shown.items()
        )
        more = "; ..." if self.num_bad_rows > _SHOWN_BAD_ROWS else ""
        wanted = (
            "want context, question and answer, or name them as in --columns context=passage,answer=answers; "
        )
        raise DsskError(
            f"{self.num_bad_rows} of {self.read} rows of {name} cannot be used: {faults}{more}: "
            f"{wanted if self.has_unknown_fields else ''}mend them or pass --skip_bad_rows {self.num_bad_rows}"
        )


# --- first pass: stage sound rows -------------------------------------------------------------------------------


def stage_rows(
    path: Path, rows: Iterable[RawRow], max_examples: int | None, tally: Tally, whole_pages: bool = False
) -> None:
    """Write the usable rows, at most `max_examples`, to the Arrow file `path`."""
    usable = _usable(rows, max_examples, tally, whole_pages)
    write_table(path, _ROW_SCHEMA, _batches(usable, _ROW_SCHEMA))


def _usable(
    rows: Iterable[RawRow], max_examples: int | None, tally: Tally, whole_pages: bool
) -> Iterator[tuple]:
    num_usable = 0
    for row in tqdm(rows, desc="reading", unit=" rows", disable=None, mininterval=1):
        tally.read += 1
        try:
            qa = to_qa(row, whole_pages)
        except BadRow as error:
            tally.add_bad_row(row.place, error)
        except Dropped as error:
            tally.dropped[str(error)] += 1
        else:
            yield qa
            num_usable += 1
            if num_usable == max_examples:
                return


def _batches(
    rows: Iterable[tuple], schema: pa.Schema, batch_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Rows, tuples in the order of `schema`, as record batches."""
    open_rows: list[tuple] = []
    for row in rows:
        open_rows.append(row)
        if len(open_rows) == batch_rows:
            yield _record_batch(open_rows, schema)
            open_rows = []
    if open_rows:
        yield _record_batch(open_rows, schema)


def _record_batch(rows: list[tuple], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _staged(path: Path) -> Iterator[dict]:
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield from batch.to_pylist()


# --- second pass: divide, number, tokenize ----------------------------------------------------------------------


def make_plan(
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    staged: dict[str, Path],
    val_fraction: float,
    tally: Tally,
    splitter: Splitter | None = None,
) -> Plan:
    """Write the question tables and the contexts' tokens, then the plan. `staged` is by split as in `find_files`."""
    numbering = _Numbering(staged, val_fraction, tally, Passages(tokenizer, splitter))
    contexts = _Contexts(settings, tokenizer)
    context_tokens = write_table(
        folder / STAGING / CONTEXT_TOKENS, _CONTEXT_SCHEMA, contexts.shards(numbering.contexts())
    )
    tables: dict[str, FileInfo] = {}
    for split in SPLITS:
        if not numbering.kept[split] and (split != "val" or val_fraction):
            raise DsskError(_no_rows(split, numbering, tally))
        source = staged.get(split) or staged["all"]
        tables |= _write_questions(
            folder / split, numbering.kept[split], source, contexts.positions, numbering.passages
        )
    plan = Plan(
        settings=settings,
        counts=Counts(
            read=tally.read,
            dropped=dict(sorted(tally.dropped.items())),
            bad_rows=tally.bad_rows,
            rows={split: len(numbering.kept[split]) for split in SPLITS},
            contexts=len(contexts.positions),
            truncated=contexts.truncated,
            lost_tokens=contexts.lost_tokens,
            tokens=sum(shard.tokens for shard in contexts.planned),
            length_histogram=contexts.histogram,
        ),
        shards=contexts.planned,
        tables=tables,
        context_tokens=context_tokens,
    )
    files.write_text(folder / STAGING / PLAN, plan.to_json())
    for path in staged.values():
        files.remove(path)
    return plan


def _no_rows(split: str, numbering: "_Numbering", tally: Tally) -> str:
    kept = {name: len(rows) for name, rows in numbering.kept.items() if rows}
    counted = f"0 usable rows in {split}, of {tally.read} rows read ({describe(tally.dropped)})"
    if not kept or not numbering.divides:
        return f"{counted}: give rows of context, question and answer for both splits"
    return (
        f"{counted}: all {sum(kept.values())} are about one document, which is never divided: pass --val_fraction 0 to "
        "train on it without val, or --val_dataset"
    )


def load_plan(folder: Path) -> Plan | None:
    """The plan of an unfinished store, if it got that far and all that it names is as it was written."""
    try:
        plan = Plan.from_file((folder / STAGING / PLAN).read_bytes())
        for name, info in {**plan.tables, f"{STAGING}/{CONTEXT_TOKENS}": plan.context_tokens}.items():
            verified(folder, name, info)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except DamagedData as error:
        print(f"{str(error).split(': ')[0]}: reading the rows again.")
        return None
    return plan


def shard_tokens(folder: Path, index: int) -> pa.RecordBatch:
    """The contexts of a planned shard: title, context, document, start, end, input_ids, truncated."""
    with pa.memory_map(str(folder / STAGING / CONTEXT_TOKENS)) as source:
        return next(islice(pa.ipc.open_stream(source), index, None))


def describe(dropped: dict[str, int]) -> str:
    """`"no long answer: 12, duplicate: 3"`."""
    return ", ".join(f"{reason}: {number}" for reason, number in dropped.items()) or "none dropped"


class Planned(NamedTuple):
    """A context that is to be encoded: a whole one, or a passage of one."""

    title: str
    text: str
    document: str  # what it is a passage of; empty for a whole context
    start: int  # its characters there
    end: int


class Passages:
    """Divides contexts; the last one is remembered, as rows about one mostly follow one another."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, splitter: Splitter | None):
        self._tokenizer, self._splitter = tokenizer, splitter
        self._last: tuple[str, str, list[Passage]] = ("", "", [])

    def of(self, row: dict) -> list[Passage]:
        """The passages of a row's context; itself, if it is short or to be cut off."""
        text, title = row["context"], row["document"]
        if self._last[:2] != (text, title) or not self._last[2]:
            self._last = (text, title, passages_of(self._splitter, self._tokenizer, text, title))
        return self._last[2]


def answering(passages: list[Passage], row: dict) -> int:
    """The index of the passage that answers a row's question.

    Of the passages that overlap the answering part of the context, those that hold a right answer come first, then
    the one that shares most words with the question.
    """
    low, high = row["start"], len(row["context"]) if row["end"] is None else row["end"]
    inside = [i for i, passage in enumerate(passages) if passage.start < high and passage.end > low]
    inside = inside or list(range(len(passages)))
    golds = [answer.lower() for answer in row["answers"]]
    holding = [i for i in inside if any(gold in passages[i].text.lower() for gold in golds)]
    asked = set(_WORD.findall(row["question"].lower()))
    return max(holding or inside, key=lambda i: len(asked & set(_WORD.findall(passages[i].text.lower()))))


class _Numbering:
    """Decides which staged rows are kept, in which split, and numbers their contexts by first appearance."""

    def __init__(self, staged: dict[str, Path], val_fraction: float, tally: Tally, passages: Passages):
        self.passages = passages
        self._staged = staged
        self._tally = tally
        self.divides = "all" in staged
        """Whether the rows come without splits."""
        self._val_documents = _choose_documents(staged["all"], val_fraction) if self.divides else set()
        self.kept = {split: _Kept() for split in SPLITS}

    def contexts(self) -> Iterator[Planned]:
        """Every distinct context of the kept rows, once, and every distinct passage of a long one.

        `kept` is complete when this is exhausted.
        """
        val_contexts = {_digest(row["context"]) for split, _, row in self._rows() if split == "val"}
        numbers: dict[int, int] = {}
        seen: set[int] = set()
        for split, index, row in self._rows():
            key = _digest(row["context"])
            if split == "train" and key in val_contexts:
                self._tally.dropped["context also in val"] += 1
                continue
            question_key = _digest(row["context"], row["question"], *row["answers"])
            if question_key in seen:
                self._tally.dropped["duplicate"] += 1
                continue
            seen.add(question_key)
            passages = self.passages.of(row)
            for passage in passages:
                if (passage_key := _digest(passage.text)) not in numbers:
                    numbers[passage_key] = len(numbers)
                    document = row["document"] or row["id"] if len(passages) > 1 else ""
                    yield Planned(row["document"], passage.text, document, passage.start, passage.end)
            gold = passages[answering(passages, row)]
            self.kept[split].append(index, numbers[_digest(gold.text)])

    def _rows(self) -> Iterator[tuple[str, int, dict]]:
        for name, path in self._staged.items():
            for index, row in enumerate(_staged(path)):
                split = name
                if name == "all":
                    split = "val" if _document(row) in self._val_documents else "train"
                yield split, index, row


class _Kept:
    """Rows of a staged file that belong to a split: their indices there and the numbers of their contexts."""

    def __init__(self) -> None:
        self.indices, self.numbers = array("q"), array("q")

    def append(self, index: int, number: int) -> None:
        self.indices.append(index)
        self.numbers.append(number)

    def __len__(self) -> int:
        return len(self.indices)


def _document(row: dict) -> str:
    """The unit that is never divided between train and val."""
    return row["document"] or row["context"]


def _choose_documents(path: Path, val_fraction: float) -> set[str]:
    """Documents that hold at least `val_fraction` of the rows; drawn by hash, so the order of rows is no matter."""
    rows_of = Counter(_document(row) for row in _staged(path))
    wanted = val_fraction * rows_of.total()
    chosen: set[str] = set()
    for document in sorted(rows_of, key=_digest):
        if wanted <= 0:
            break
        chosen.add(document)
        wanted -= rows_of[document]
    return chosen


def _digest(*texts: str) -> int:
    return xxhash.xxh3_128_intdigest("\0".join(texts).encode())


class _Contexts:
    """Cuts contexts into shards; inside a shard the longest comes first."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase):
        self._settings = settings
        self._tokenizer = tokenizer
        self.positions = array("q")
        """Number of a context -> its row in `contexts/`."""
        self.planned: list[PlannedShard] = []
        self.truncated = self.lost_tokens = 0
        self.histogram: list[int] = []

    def shards(self, contexts: Iterator[Planned]) -> Iterator[pa.RecordBatch]:
        """One record batch of `_CONTEXT_SCHEMA` a shard."""
        while planned := list(islice(contexts, self._settings.shard_rows)):
            yield self._shard(planned)

    def _shard(self, planned: list[Planned]) -> pa.RecordBatch:
        maximum = self._settings.maximum_input_length
        ids = tokenize_contexts(self._tokenizer, [context.text for context in planned])
        truncated = [len(row) > maximum for row in ids]
        self.truncated += sum(truncated)
        self.lost_tokens += sum(max(0, len(row) - maximum) for row in ids)
        ids = [row[:maximum] for row in ids]
        for row in ids:
            bin_index = (len(row) - 1) // HISTOGRAM_BIN_TOKENS
            self.histogram += [0] * (bin_index + 1 - len(self.histogram))
            self.histogram[bin_index] += 1
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        first_row = len(self.positions)
        self.positions.extend([0] * len(ids))
        for place, i in enumerate(order):
            self.positions[first_row + i] = first_row + place
        rows = [(*planned[i], ids[i]) for i in order]
        key = xxhash.xxh3_128_hexdigest(json.dumps([self._settings.encoding_key, rows]).encode())
        tokens = sum(map(len, ids))
        self.planned.append(PlannedShard(key=key, first_row=first_row, rows=len(rows), tokens=tokens))
        return _record_batch([(*rows[k], truncated[i]) for k, i in enumerate(order)], _CONTEXT_SCHEMA)


def _write_questions(
    folder: Path, kept: _Kept, staged: Path, positions: array, passages: Passages
) -> dict[str, FileInfo]:
    features = QUESTION_FEATURES
    name = f"{shard_name(0, 1)}.arrow"
    files.make_folder(folder)
    batches = _batches(_questions(staged, kept, positions, passages), features.arrow_schema)
    info = write_table(folder / name, features.arrow_schema, batches)
    return {
        f"{folder.name}/{name}": info,
        **write_dataset_files(folder, features, {name: info.xxh3_128}),
    }


def _questions(path: Path, kept: _Kept, positions: array, passages: Passages) -> Iterator[tuple]:
    """Rows of `QUESTION_FEATURES`."""
    numbers = iter(zip(kept.indices, kept.numbers, strict=True))
    wanted, number = next(numbers, (-1, 0))
    for index, row in enumerate(_staged(path)):
        if index == wanted:
            answers = row["answers"]
            found = passages.of(row)
            context = found[answering(found, row)].text
            yield row["id"], context, row["question"], answers[0], answers, positions[number]
            wanted, number = next(numbers, (-1, 0))
