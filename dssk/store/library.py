"""A library of encoded contexts that grows.

    library.json        which model encodes, and which segments count: written last, so that a change is whole or absent
    contexts-*.arrow    segments: id, title, number, truncated, context, n_tokens, encoder_hidden_states [, scale]

States are packed as in a store (`dssk.data.store`). A store opens as a library, too: read-only, and the id of a
context is its row number.
"""

import contextlib
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import bm25s
import pyarrow as pa
import torch
import xxhash

from dssk.errors import DamagedData, DsskError
from dssk.inference.loading import find_encoder
from dssk.store import format as store
from dssk.store.encoder import TextEncoder, describe_encoding
from dssk.utils import files
from dssk.utils.flags import nearest

MANIFEST = "library.json"
SEGMENT_BYTES = 256_000_000  # a full segment: removing a context writes its segment again
SMALL_BYTES = 16_000_000  # a smaller one is joined with what is added next, so that there are never many

REMEDY = "begin the library anew"
WORD = r"\w+"  # by default bm25s leaves out words of one character, such as digits


class Segment(store.Strict):
    """One file of contexts."""

    name: str
    rows: int
    num_bytes: int
    xxh3_128: str


class Manifest(store.Encoding):
    """Which model encodes, and the segments that count."""

    segments: list[Segment] = []


@dataclass(frozen=True)
class Context:
    """One context of a library."""

    id: str
    title: str
    text: str
    n_tokens: int
    truncated: bool  # the text is longer than maximum_input_length; a store does not say, then False
    encoder_hidden_states: torch.Tensor  # (n_tokens, hidden_size), a view of the memory-mapped file


class Hit(NamedTuple):
    """A context that was found, and its BM25 score."""

    id: str
    score: float


class ContextLibrary:
    """Contexts in a folder, encoded once each.

    >>> library = ContextLibrary("facts", model="runs/<exp_id>")
    >>> library.add(["Amber Falls was founded in 1842 ."], ids=["amber"])
    >>> model.answer("when was amber falls founded", library.get("amber").encoder_hidden_states, tokenizer)

    Args:
        model: begins a new library, which keeps its identity: a base model, a checkpoint, a fused model, or a run's
            folder; the base in it encodes. For a library that exists it may be left out; another one is refused.
        storage_dtype: how a new library keeps states; see `dssk.data.store`.
        maximum_input_length: tokens that contexts of a new library are cut to; the model's positions if not given.

    What another process changes is seen after the next `add` or `remove`, or by opening the library again. All
    errors are `DsskError`s.
    """

    def __init__(
        self,
        path: str | Path,
        model: str | Path | None = None,
        *,
        storage_dtype: store.StorageDtype = "bf16",
        maximum_input_length: int | None = None,
    ):
        self.path = Path(path)
        self.read_only = (self.path / store.MANIFEST).is_file()
        self._model = find_encoder(model) if model else None
        if not self.read_only and not (self.path / MANIFEST).is_file():
            if self._model is None:
                raise DsskError(
                    f"no library of contexts at {path}: to begin one, name the model that encodes"
                )
            self._create(Manifest(**describe_encoding(*self._model, storage_dtype, maximum_input_length)))
        self._open()
        if model:
            self.check_model(model)

    def check_model(self, model: str | Path) -> None:
        """Raise `DsskError` if `model` cannot read these contexts, because another base encoded them."""
        store.check_model(self.manifest, *find_encoder(model))

    # --- reading -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        return id in self._rows

    def __iter__(self) -> Iterator[str]:
        """The ids, in the order in which the contexts were added."""
        return iter(self._rows)

    def get(self, id: str) -> Context:
        """The context of an id. Raises `DsskError` if there is none."""
        shard, row = self._find(id)
        values = {
            name: shard.table[name][row].as_py()
            for name in ("title", "truncated", "context", "n_tokens")
            if name in shard.table.column_names
        }
        return Context(
            id=id,
            title=values.get("title", ""),
            text=values["context"],
            n_tokens=values["n_tokens"],
            truncated=values.get("truncated", False),
            encoder_hidden_states=shard.states(row),
        )

    def search(self, question: str, k: int = 1) -> list[Hit]:
        """At most `k` contexts that share words with `question`, best first, by BM25 over titles and texts."""
        (words,) = bm25s.tokenize([question], token_pattern=WORD, return_ids=False, show_progress=False)
        if self._index is None or not any(word in self._index.vocab_dict for word in words):
            return []
        rows, scores = self._index.retrieve([words], k=min(k, len(self)), show_progress=False)
        ids = list(self._rows)
        return [
            Hit(ids[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True) if score > 0
        ]

    @cached_property
    def _index(self) -> bm25s.BM25 | None:
        """Made from all texts when it is first needed; None if there are no words in them."""
        contexts = map(self.get, self)
        texts = [f"{c.title}\n{c.text}" for c in contexts]
        words = bm25s.tokenize(texts, token_pattern=WORD, show_progress=False)
        if not words.vocab:
            return None
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        return index

    def verify(self) -> None:
        """Read all that is kept. Raises `DamagedData` that names the first segment that is not as it was written."""
        if self.read_only:
            raise DsskError(
                f"{self.path} is the store of a data set: run `python -m dssk.data.verify {self.path}`"
            )
        for segment in self.manifest.segments:
            if files.xxh3_128(self.path / segment.name) != segment.xxh3_128:
                raise DamagedData(f"{self.path / segment.name} is damaged, its checksum is another: {REMEDY}")

    def _find(self, id: str) -> tuple[store.Shard, int]:
        if id not in self._rows:
            raise DsskError(f"no context {id!r} in {self.path}{nearest(str(id), self._rows)}")
        return self._rows[id]

    def _open(self) -> None:
        """See what is in the folder now."""
        self.__dict__.pop("_index", None)
        if self.read_only:
            self.manifest, shards = _open_store(self.path)
            places = [(shard, row) for shard in shards for row in range(len(shard.table))]
            self._rows = {str(number): place for number, place in enumerate(places)}
            return
        try:
            self._map_segments()
        except FileNotFoundError:  # replaced by another process after the manifest was read
            self._map_segments()
        numbered = sorted(
            (number, id, name, row)
            for name, shard in self._shards.items()
            for row, (number, id) in enumerate(zip(*_columns(shard, "number", "id"), strict=True))
        )
        self._rows = {id: (self._shards[name], row) for _, id, name, row in numbered}
        self._next_number = numbered[-1][0] + 1 if numbered else 0

    def _map_segments(self) -> None:
        self.manifest = load_manifest(self.path)
        self._shards = {}
        for segment in self.manifest.segments:
            path = self.path / segment.name
            if path.stat().st_size != segment.num_bytes:
                raise DamagedData(f"{path} is damaged, it is not {segment.num_bytes} bytes: {REMEDY}")
            self._shards[segment.name] = _map(path, self.manifest)

    # --- writing -----------------------------------------------------------------------------------------------

    def add(
        self, texts: Sequence[str], ids: Sequence[str] | None = None, titles: Sequence[str] | None = None
    ) -> list[str]:
        """Encode `texts` and keep all of them or, if anything fails, none; returns their ids.

        Ids that are not given are made from the texts. One that exists is refused.
        """
        ids = [content_id(text) for text in texts] if ids is None else list(ids)
        titles = [""] * len(texts) if titles is None else list(titles)
        if not len(texts) == len(ids) == len(titles):
            raise DsskError(
                f"got {len(texts)} texts, {len(ids)} ids and {len(titles)} titles, want as many of each"
            )
        if empty := [id for id, text in zip(ids, texts, strict=True) if not text.strip()]:
            raise DsskError(f"the context {empty[0]!r} is empty")
        with self._writing():
            known = set(self._rows)
            for id in ids:
                if id in known:
                    raise DsskError(
                        f"{self.path} has a context {id!r}: remove it, or give the new one another id"
                    )
                known.add(id)
            if texts:
                self._publish(self._write(texts, ids, titles))
        return ids

    def remove(self, ids: str | Iterable[str]) -> None:
        """Forget contexts, all of them or none, and free their space."""
        with self._writing():
            gone: dict[store.Shard, set[int]] = {}
            for id in [ids] if isinstance(ids, str) else ids:
                shard, row = self._find(id)
                gone.setdefault(shard, set()).add(row)
            segments = []
            for segment in self.manifest.segments:
                shard = self._shards[segment.name]
                rows = [row for row in range(segment.rows) if row not in gone.get(shard, ())]
                if len(rows) == segment.rows:
                    segments.append(segment)
                elif rows:
                    segments.append(self._write_segment(shard.table.take(rows).to_batches()))
            self._publish(segments)

    def _create(self, manifest: Manifest) -> None:
        files.make_folder(self.path.parent)
        with store.lock(self.path):
            if (self.path / MANIFEST).is_file():  # another process was sooner
                return
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise DsskError(f"{self.path} holds something else: begin a library in a new folder")
            files.make_folder(self.path)
            files.publish_json(self.path / MANIFEST, manifest.model_dump())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer, and start from what is there now."""
        if self.read_only:
            raise DsskError(
                f"{self.path} is the store of a data set, it can only be read: begin a library in a new folder"
            )
        with store.lock(self.path):
            self._open()
            files.remove_temps(self.path)
            for path in self.path.glob("contexts-*.arrow"):
                if path.name not in self._shards:  # left by a writer that was killed
                    files.remove(path)
            yield

    def _publish(self, segments: list[Segment]) -> None:
        """Let exactly these segments count, and remove the others; who has them mapped can read on."""
        files.publish_json(
            self.path / MANIFEST, self.manifest.model_copy(update={"segments": segments}).model_dump()
        )
        for name in self._shards.keys() - {segment.name for segment in segments}:
            files.remove(self.path / name)
        self._open()

    def _write(self, texts: Sequence[str], ids: Sequence[str], titles: Sequence[str]) -> list[Segment]:
        """Encode and write contexts; returns all segments that are to count then."""
        small = [s for s in self.manifest.segments if s.num_bytes < SMALL_BYTES]
        segments = [s for s in self.manifest.segments if s not in small]
        batches = [batch for s in small for batch in self._shards[s.name].table.to_batches()]
        num_bytes = sum(s.num_bytes for s in small)
        for rows, record in self._encoder.encode(texts):
            batch = pa.record_batch(
                {
                    "id": pa.array([ids[row] for row in rows], pa.string()),
                    "title": pa.array([titles[row] for row in rows], pa.string()),
                    "number": pa.array([self._next_number + row for row in rows], pa.int64()),
                    **record,
                }
            )
            batches.append(batch)
            num_bytes += batch.nbytes
            if num_bytes >= SEGMENT_BYTES:
                segments.append(self._write_segment(batches))
                batches, num_bytes = [], 0
        return [*segments, self._write_segment(batches)] if batches else segments

    def _write_segment(self, batches: list[pa.RecordBatch]) -> Segment:
        name = f"contexts-{secrets.token_hex(8)}.arrow"
        info = store.write_table(self.path / name, batches[0].schema, batches)
        return Segment(name=name, rows=sum(map(len, batches)), **info.model_dump())

    @cached_property
    def _encoder(self) -> TextEncoder:
        """Loaded for the first `add`: searching and reading need no model."""
        return TextEncoder(
            self.manifest, *(self._model or (self.manifest.model_id, self.manifest.model_revision))
        )


def content_id(text: str) -> str:
    """The id of a context that was given none: 16 hex digits that depend on its text."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def load_manifest(path: Path) -> Manifest:
    """Read `library.json`. Raises `DamagedData` if it cannot be understood."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValueError as error:
        raise DamagedData(f"{path / MANIFEST} is damaged: {REMEDY}") from error
    if manifest.format_version != store.FORMAT_VERSION:
        raise DsskError(
            f"{path} has format version {manifest.format_version}, this dssk reads {store.FORMAT_VERSION}: {REMEDY}"
        )
    return manifest


def _open_store(path: Path) -> tuple[Any, list[store.Shard]]:
    manifest = store.load_manifest(path)
    store.check_sizes(path, manifest)
    if manifest.storage_dtype is None:
        raise DsskError(f"{path} holds texts only: encode them, without --text_only")
    names = [store.shard_name(index, len(manifest.shards)) for index in range(len(manifest.shards))]
    return manifest, [_map(path / store.CONTEXTS / f"{name}.arrow", manifest) for name in names]


def _map(path: Path, encoding: store.Encoding) -> store.Shard:
    return store.Shard(path, cast(store.StorageDtype, encoding.storage_dtype), encoding.hidden_size)


def _columns(shard: store.Shard, *names: str) -> list[list[Any]]:
    return [shard.table[name].to_pylist() for name in names]


def describe(context: Context) -> str:
    """One line about a context."""
    cut = " (cut)" if context.truncated else ""
    return f"{context.id}\t{context.n_tokens} tokens{cut}\t{context.title or ' '.join(context.text.split())[:60]}"


def read_contexts(file: Path) -> list[dict[str, str]]:
    """The contexts of a text file or of JSON lines, as dicts with `context`, `id` and `title`."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DsskError(f"cannot read {file}: {error}") from error
    if file.suffix != ".jsonl":
        return [{"context": text.strip(), "id": file.stem, "title": ""}]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                context = row["context"]
                id, title = row.get("id", content_id(context)), row.get("title", "")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DsskError(
                    f'{file}:{number}: want {{"context": text}}, with "id" and "title" at will'
                ) from None
            rows.append({"context": context, "id": str(id), "title": str(title)})
    return rows
