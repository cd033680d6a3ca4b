"""A library: a store without questions, which grows and is searched.

    contexts/data-*.arrow    segments, named at random: a change writes new ones and then the manifest, so it is whole
                             or absent
    search-*/                the index of the words of the segment of that name, made with it

Opening reads no context and no state. Texts that are longer than a passage may be are kept as passages. The store of a
data set opens as a library that can only be read; one without indices is indexed in memory.
"""

import contextlib
import itertools
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
import xxhash

from dssk.errors import DamagedData, DsskError
from dssk.inference.loading import find_encode_layer, find_encoder
from dssk.inference.passages import Splitter, passages_of
from dssk.inference.rounding import StorageDtype, encoding_bytes
from dssk.store import v01, verify
from dssk.store.encoder import TextEncoder, describe_encoding
from dssk.store.manifest import CONTEXTS, MANIFEST, FileInfo, Manifest, Segment
from dssk.store.opening import check_model, is_store, load_manifest, repair, verified
from dssk.store.search import WordIndex, search
from dssk.store.segments import (
    Origin,
    SegmentFile,
    context_features,
    encoded_record,
    open_segment,
    read_segment,
    write_table,
)
from dssk.utils import files
from dssk.utils.flags import nearest

SEGMENT_BYTES = 256_000_000  # a full segment: removing a context writes its segment again
SMALL_BYTES = 16_000_000  # a smaller one is joined with what is added next, so that there are never many
BLOCK_CONTEXTS = 512  # encoded together
SEARCH = "search-"

# What a change of this library, or of one of version 0.1, may have left when it was killed.
_OURS = re.compile(
    rf"{CONTEXTS}/data-[0-9a-f]{{16}}\.arrow|{SEARCH}[0-9a-f]{{16}}|contexts-[0-9a-f]{{16}}\.arrow"
)


@dataclass(frozen=True)
class Context:
    """One context of a library."""

    id: str
    title: str
    text: str
    document: str  # the id of the text that it is a passage of; empty for a whole text
    start: int  # its first character there
    end: int  # and the one after its last
    n_tokens: int
    truncated: bool  # the text is longer than maximum_input_length
    encoder_hidden_states: torch.Tensor  # (n_tokens, hidden_size), a view of the memory-mapped file


class Hit(NamedTuple):
    """A context that was found, and its BM25 score."""

    id: str
    score: float


class Piece(NamedTuple):
    """A text, or a passage of one, to be encoded."""

    id: str
    title: str
    text: str
    origin: Origin


class Place(NamedTuple):
    """The location of a context."""

    segment: SegmentFile
    row: int


class ContextLibrary:
    """Contexts in a folder, encoded once each.

    >>> library = ContextLibrary("facts", model="runs/<exp_id>")
    >>> library.add(["Amber Falls was founded in 1842 ."], ids=["amber"])
    >>> model.answer("when was amber falls founded", library.get("amber").encoder_hidden_states, tokenizer)

    Args:
        model: begins a new library, which keeps its identity: a base model, a checkpoint, a fused model, or a run's
            folder; the base in it encodes. For a library that exists it may be left out; another one is refused.
        storage_dtype: how a new library keeps states; see `dssk.inference.rounding`.
        maximum_input_length: most tokens of a context of a new library; the model's positions if not given.

    What another process changes is seen after the next `add` or `remove`, or by opening the library again. Every byte
    is checked when a library is opened: a file that was read before and is the same since is not read again. All
    errors are `DsskError`s.
    """

    def __init__(
        self,
        path: str | Path,
        model: str | Path | None = None,
        *,
        storage_dtype: StorageDtype = "bf16",
        maximum_input_length: int | None = None,
    ):
        self.path = Path(path)
        self._model = find_encoder(model) if model else None
        if not is_store(self.path):
            if self._model is None:
                raise DsskError(
                    f"no library of contexts at {path}: to begin one, name the model that encodes"
                )
            layer = find_encode_layer(model)  # type: ignore[arg-type]
            encoding = describe_encoding(*self._model, storage_dtype, maximum_input_length, layer)
            self._create(Manifest(**encoding, segments=[], files={}))
        self._open()
        if model:
            self.check_model(model)

    @property
    def read_only(self) -> bool:
        return not self.manifest.is_library

    def check_model(self, model: str | Path) -> None:
        """Raise `DsskError` if `model` cannot read these contexts, because another base encoded them."""
        check_model(self.manifest, *find_encoder(model), find_encode_layer(model))

    # --- reading -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(segment.rows for segment in self.manifest.segments)

    def __contains__(self, id: object) -> bool:
        return id in self._places

    def __iter__(self) -> Iterator[str]:
        """The ids, in the order in which the contexts were added."""
        return iter(self._places)

    def get(self, id: str) -> Context:
        """The context of an id. Raises `DsskError` if there is none."""
        segment, row = self._find(id)
        text = segment.value("context", row, "")
        return Context(
            id=id,
            title=segment.value("title", row, ""),
            text=text,
            document=segment.value("document", row, ""),
            start=segment.value("start", row, 0),
            end=segment.value("end", row, len(text)),
            n_tokens=segment.value("n_tokens", row, 0),
            truncated=segment.value("truncated", row, False),
            encoder_hidden_states=segment.states(row),
        )

    def search(self, question: str, k: int = 1) -> list[Hit]:
        """At most `k` contexts that share words with `question`, best first, by BM25 over titles and texts."""
        try:
            indices = self._indices
        except DamagedData:
            if load_manifest(self.path) == self.manifest:
                raise
            self._open()  # another process has changed the library
            indices = self._indices
        return [Hit(self._ids[row], score) for row, score in search(indices, question, k)]

    @cached_property
    def _indices(self) -> list[WordIndex]:
        """The indices of all contexts, in their order."""
        kept = [self._index_files(segment) for segment in self.manifest.segments]
        if not any(kept):
            return [WordIndex.of_texts(_texts(self._places.values()))]
        opened = zip(self.manifest.segments, self._segments, kept, strict=True)
        return [self._index_of(*segment) for segment in opened]

    def _index_of(self, segment: Segment, opened: SegmentFile, infos: dict[str, FileInfo]) -> WordIndex:
        if not infos:  # there are no words in it
            return WordIndex.of_texts(_texts(Place(opened, row) for row in range(segment.rows)))
        paths = [verified(self.path, name, info) for name, info in infos.items()]
        index = WordIndex.load(paths[0].parent)
        if len(index) != segment.rows:
            raise DamagedData(f"{paths[0].parent} is not the index of these contexts: {repair(self.path)}")
        return index

    def _index_files(self, segment: Segment) -> dict[str, FileInfo]:
        folder = f"{_index_name(segment)}/"
        return {name: info for name, info in self.manifest.files.items() if name.startswith(folder)}

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The location of each context, by id and in order. Made on first use: opening reads no ids."""
        return _places(self._segments)

    @cached_property
    def _ids(self) -> list[str]:
        return list(self._places)

    def num_tokens(self, text: str) -> int:
        """The number of tokens of a text, uncut."""
        return len(self._encoder.tokenize([text])[0])

    def verify(self) -> None:
        """Read all that is kept. Raises `DamagedData` that names what is not as it was written."""
        verify.check(self.path, anew=True)

    def _find(self, id: str) -> Place:
        if id not in self._places:
            raise DsskError(f"no context {id!r} in {self.path}{nearest(str(id), self._places)}")
        return self._places[id]

    def _open(self) -> None:
        """See what is in the folder now."""
        for found in ("_indices", "_places", "_ids"):
            self.__dict__.pop(found, None)
        self.manifest = load_manifest(self.path)
        if self.manifest.storage_dtype is None:
            raise DsskError(f"{self.path} holds texts only: encode them, without --text_only")
        try:
            self._segments = self._open_segments()
        except DamagedData:
            manifest = load_manifest(self.path)
            if manifest == self.manifest:
                raise
            self.manifest = manifest  # changed by another process after it was read
            self._segments = self._open_segments()

    def _open_segments(self) -> list[SegmentFile]:
        return [open_segment(self.path, self.manifest, segment) for segment in self.manifest.segments]

    # --- writing -----------------------------------------------------------------------------------------------

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        titles: Sequence[str] | None = None,
        splitter: Splitter | None = None,
        truncate: bool = False,
    ) -> list[str]:
        """Encode `texts` and keep all of them or, if anything fails, none; returns the ids of what was added.

        Ids that are not given are made from the texts. One that exists is refused. A text longer than `splitter`
        allows (by default than `maximum_input_length`) becomes passages `ID#1`, `ID#2`, ...; with `truncate` its
        beginning is kept alone.
        """
        ids = [content_id(text) for text in texts] if ids is None else list(ids)
        titles = [""] * len(texts) if titles is None else list(titles)
        if not len(texts) == len(ids) == len(titles):
            raise DsskError(
                f"got {len(texts)} texts, {len(ids)} ids and {len(titles)} titles, want as many of each"
            )
        if empty := [id for id, text in zip(ids, texts, strict=True) if not text.strip()]:
            raise DsskError(f"the context {empty[0]!r} is empty")
        splitter = splitter or Splitter(self.manifest.maximum_input_length)
        if splitter.tokens > self.manifest.maximum_input_length:
            raise DsskError(
                f"passages of {splitter.tokens} tokens are longer than this library's contexts may be: want at most "
                f"{self.manifest.maximum_input_length}"
            )
        added: list[str] = []
        with self._writing():
            known = {*self._places, *self._documents()}
            self._refuse_known(ids, known)
            if texts:
                segments, small = self._without_small()
                pieces = self._pieces(ids, titles, texts, None if truncate else splitter)
                tables = itertools.chain(self._tables(small), self._encoded(pieces, known, added))
                self._commit([*segments, *map(self._write, _grouped(tables))])
        return added

    def _documents(self) -> set[str]:
        """The ids of texts that are kept as passages."""
        return {document for segment in self._segments for document in segment.column("document", "")} - {""}

    def _refuse_known(self, ids: Sequence[str], known: set[str]) -> None:
        """Raise `DsskError` for an id that stands in `known` or twice; all of them do afterwards."""
        for id in ids:
            if id in known:
                raise DsskError(
                    f"{self.path} has a context {id!r}: remove it, or give the new one another id"
                )
            known.add(id)

    def _pieces(
        self, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str], splitter: Splitter | None
    ) -> Iterator[Piece]:
        """Each text as a whole, or its passages."""
        for id, title, text in zip(ids, titles, texts, strict=True):
            passages = passages_of(splitter, self._encoder.tokenizer, text, title)
            if len(passages) == 1:
                yield Piece(id, title, passages[0].text, Origin("", 0, len(text)))
                continue
            for number, (passage, start, end) in enumerate(passages, start=1):
                yield Piece(f"{id}#{number}", title, passage, Origin(id, start, end))

    def remove(self, ids: str | Iterable[str]) -> None:
        """Forget contexts, all of them or none, and free their space; the id of a long text is that of its passages."""
        with self._writing():
            passages = self._passages()
            wanted = [ids] if isinstance(ids, str) else ids
            gone = {place for id in wanted for place in passages.get(id) or [self._find(id)]}
            segments: list[Segment] = []
            for segment, places in self._by_segment():
                kept = [place for place in places if place not in gone]
                if segment and len(kept) == len(places):
                    segments.append(segment)
                else:
                    segments += map(self._write, self._tables(kept))
            self._commit(segments)

    def _passages(self) -> dict[str, list[Place]]:
        """The passages of each text that is kept as such, by its id."""
        passages: dict[str, list[Place]] = {}
        for segment in self._segments:
            for row, document in enumerate(segment.column("document", "")):
                if document:
                    passages.setdefault(document, []).append(Place(segment, row))
        return passages

    def _create(self, manifest: Manifest) -> None:
        with files.only_writer(self.path):
            if is_store(self.path):  # another process was sooner
                return
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise DsskError(f"{self.path} holds something else: begin a library in a new folder")
            files.make_folder(self.path)
            files.write_text(self.path / MANIFEST, manifest.to_json())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer, and start from what is there now, all of it verified."""
        if self.read_only:
            raise DsskError(
                f"{self.path} is the store of a data set, it can only be read: begin a library in a new folder"
            )
        with files.only_writer(self.path):
            self._open()
            files.remove_temps(self.path)
            self._remove_unnamed()
            files.make_folder(files.inside(self.path, CONTEXTS))
            yield

    def _remove_unnamed(self) -> None:
        """Remove segments and indices that do not count: of the last manifest, or of a writer that was killed."""
        named = {
            name if name.startswith(CONTEXTS) else name.split("/")[0] for name in self.manifest.all_files
        }
        for pattern in (f"{CONTEXTS}/*", "*"):
            for path in self.path.glob(pattern):
                name = path.relative_to(self.path).as_posix()
                if _OURS.fullmatch(name) and name not in named:
                    files.remove(files.inside(self.path, name))

    def _by_segment(self) -> list[tuple[Segment | None, list[Place]]]:
        """All contexts in order, by segment; those of version 0.1 as one that is to be written anew."""
        if (self.path / v01.LIBRARY).is_file() and not (self.path / MANIFEST).is_file():
            return [(None, list(self._places.values()))]
        opened = zip(self.manifest.segments, self._segments, strict=True)
        return [(info, [Place(segment, row) for row in range(info.rows)]) for info, segment in opened]

    def _without_small(self) -> tuple[list[Segment], list[Place]]:
        """The segments that stay, and what lies in small ones at the end."""
        segments = self._by_segment()
        small: list[Place] = []
        while segments and (segments[-1][0] is None or segments[-1][0].num_bytes < SMALL_BYTES):
            small = segments.pop()[1] + small
        return [segment for segment, _ in segments if segment], small

    def _tables(self, places: Sequence[Place]) -> Iterator[pa.Table]:
        """Contexts of the library, in this order, as tables of about SEGMENT_BYTES."""
        schema = context_features(self._storage_dtype).arrow_schema
        opened = list(dict.fromkeys(place.segment for place in places))
        first = dict(zip(opened, np.cumsum([0, *(len(segment.table) for segment in opened)]), strict=False))
        num_tokens = [place.segment.value("n_tokens", place.row, 0) for place in places]
        for rows in self._chunks(num_tokens):
            indices = [first[places[row].segment] + places[row].row for row in rows]
            yield pa.concat_tables([segment.rows_as(schema) for segment in opened]).take(indices)

    def _encoded(self, pieces: Iterator[Piece], known: set[str], added: list[str]) -> Iterator[pa.Table]:
        """New contexts in their order, as tables of at most about SEGMENT_BYTES; their ids go to `added`."""
        longest = self.manifest.maximum_input_length
        while block := list(itertools.islice(pieces, BLOCK_CONTEXTS)):
            self._refuse_known([piece.id for piece in block if piece.origin.document], known)
            tokens = self._encoder.tokenize([piece.text for piece in block])
            for rows in self._chunks([min(longest, len(ids)) for ids in tokens]):
                yield self._encoded_rows([block[row] for row in rows], [tokens[row] for row in rows])
            added += [piece.id for piece in block]

    def _encoded_rows(self, pieces: Sequence[Piece], tokens: Sequence[list[int]]) -> pa.Table:
        done = list(self._encoder.encode([piece.text for piece in pieces], tokens))
        records = []
        for batch in done:
            ids, titles, texts, origins = zip(*(pieces[row] for row in batch.rows), strict=True)
            records.append(encoded_record(ids, titles, texts, origins, *batch[1:]))
        order = np.argsort([row for batch in done for row in batch.rows])
        return pa.Table.from_batches(records).take(order)

    def _chunks(self, num_tokens: Sequence[int]) -> Iterator[range]:
        """Consecutive rows of contexts of these lengths, of about SEGMENT_BYTES."""
        token_bytes = encoding_bytes(self._storage_dtype, self.manifest.hidden_size)
        start = num_bytes = 0
        for row, tokens in enumerate(num_tokens):
            num_bytes += tokens * token_bytes
            if num_bytes >= SEGMENT_BYTES or row == len(num_tokens) - 1:
                yield range(start, row + 1)
                start, num_bytes = row + 1, 0

    def _write(self, table: pa.Table) -> Segment:
        name = f"{CONTEXTS}/data-{secrets.token_hex(8)}.arrow"
        info = write_table(self.path / name, table.schema, table.combine_chunks().to_batches())
        return Segment(name=name, rows=len(table), **info.model_dump())

    def _commit(self, segments: list[Segment]) -> None:
        """Make these segments the library's, and remove the others; readers that have them mapped can go on."""
        infos: dict[str, FileInfo] = {}
        for segment in segments:
            infos |= self._index_files(segment) or self._write_index(segment)
        manifest = self.manifest.model_copy(update={"segments": segments, "files": infos})
        files.write_text(self.path / MANIFEST, manifest.to_json())
        files.remove(self.path / v01.LIBRARY)
        self._open()
        self._remove_unnamed()

    def _write_index(self, segment: Segment) -> dict[str, FileInfo]:
        """The files of the index of a segment; none if there are no words in it."""
        opened = read_segment(self.path / segment.name, self.manifest, segment.rows)
        index = WordIndex.of_texts(_texts(Place(opened, row) for row in range(segment.rows)))
        name = _index_name(segment)
        with files.atomic_folder(self.path / name) as folder:
            index.save(folder)
            return {
                f"{name}/{path.name}": FileInfo(num_bytes=path.stat().st_size, xxh3_128=files.xxh3_128(path))
                for path in folder.iterdir()
            }

    @property
    def _storage_dtype(self) -> StorageDtype:
        return cast(StorageDtype, self.manifest.storage_dtype)

    @cached_property
    def _encoder(self) -> TextEncoder:
        """Loaded for the first `add`: searching and reading need no model."""
        return TextEncoder(
            self.manifest, *(self._model or (self.manifest.model_id, self.manifest.model_revision))
        )


def content_id(text: str) -> str:
    """The id of a context that was given none: 16 hex digits that depend on its text."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def _index_name(segment: Segment) -> str:
    """The folder of the index of a segment."""
    return f"{SEARCH}{Path(segment.name).stem.removeprefix('data-')}"


def _places(segments: Iterable[SegmentFile]) -> dict[str, Place]:
    """The location of each context, by id and in order."""
    numbered: list[tuple[int, str, Place]] = []
    for segment in segments:
        first = len(numbered)
        # Libraries of version 0.1 have numbers, its stores have no ids.
        rows = zip(segment.column("number"), segment.column("id"), strict=True)
        for row, (number, id) in enumerate(rows):
            place = Place(segment, row)
            numbered.append((first + row if number is None else number, id or str(first + row), place))
    numbered.sort(key=lambda entry: entry[0])
    return {id: place for _, id, place in numbered}


def _texts(places: Iterable[Place]) -> list[str]:
    """The text of each context that is indexed: title and content."""
    return [f"{s.value('title', row, '')}\n{s.value('context', row, '')}" for s, row in places]


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of at least SEGMENT_BYTES, but for the last."""
    open_tables: list[pa.Table] = []
    for table in tables:
        open_tables.append(table)
        if sum(part.nbytes for part in open_tables) >= SEGMENT_BYTES:
            yield pa.concat_tables(open_tables)
            open_tables = []
    if open_tables:
        yield pa.concat_tables(open_tables)
