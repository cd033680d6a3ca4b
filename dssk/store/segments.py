"""Segments: Arrow files of contexts with their encoder states, written as a stream and read by memory map.

    id, title, context, document, start, end, n_tokens, truncated, encoder_hidden_states [, scale]

Arrow has no bfloat16, hence states are bytes: (n_tokens, hidden_size) in row-major order.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Features, Value

from dssk.inference.rounding import SCALE_DTYPE, TORCH_DTYPES, StorageDtype, dequantize
from dssk.store.manifest import FileInfo, Manifest, Segment
from dssk.store.opening import repair, verified
from dssk.utils import files
from dssk.utils.files import content_of


def context_features(storage_dtype: StorageDtype) -> Features:
    """The columns of a segment."""
    columns = {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "document": Value("string"),  # what it is a passage of; empty for a whole text
        "start": Value("int64"),  # its first character there
        "end": Value("int64"),  # and the one after its last
        "n_tokens": Value("int32"),
        "truncated": Value("bool"),  # the context is longer than maximum_input_length
        "encoder_hidden_states": Value("large_binary"),
    }
    if storage_dtype == "int8":
        columns["scale"] = Value("large_binary")  # (n_tokens,) of bfloat16
    return Features(columns)


# --- writing ---------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """The position of a passage in its document, in characters; no document for a whole text."""

    document: str
    start: int
    end: int


def encoded_record(
    ids: Sequence[str],
    titles: Sequence[str],
    texts: Sequence[str],
    origins: Sequence[Origin],
    num_tokens: Sequence[int],
    truncated: Sequence[bool],
    states: torch.Tensor,
    scale: torch.Tensor | None,
) -> pa.RecordBatch:
    """Contexts with their states (tokens, hidden_size), as `quantize` made them, as rows of a segment."""
    lengths = np.array(num_tokens)
    columns = {
        "id": pa.array(ids, pa.string()),
        "title": pa.array(titles, pa.string()),
        "context": pa.array(texts, pa.string()),
        "document": pa.array([origin.document for origin in origins], pa.string()),
        "start": pa.array([origin.start for origin in origins], pa.int64()),
        "end": pa.array([origin.end for origin in origins], pa.int64()),
        "n_tokens": pa.array(lengths, pa.int32()),
        "truncated": pa.array(truncated, pa.bool_()),
        "encoder_hidden_states": _binary(states, lengths),
    }
    if scale is not None:
        columns["scale"] = _binary(scale, lengths)
    return pa.record_batch(columns)


def _binary(values: torch.Tensor, lengths: np.ndarray) -> pa.Array:
    """Rows of `values` (tokens, ...), `lengths` of them to each entry, as a large_binary array without a copy."""
    data = values.contiguous().cpu().flatten().view(torch.uint8).numpy()
    row_bytes = len(data) // len(values)
    offsets = np.concatenate([[0], np.cumsum(lengths)]) * row_bytes
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)]
    )


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> FileInfo:
    """Write an Arrow stream, whole or not at all."""
    with files.atomic_file(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return FileInfo(num_bytes=file.num_bytes, xxh3_128=file.hexdigest())


# --- reading ---------------------------------------------------------------------------------------------------


def open_segment(folder: Path, manifest: Manifest, segment: Segment) -> "SegmentFile":
    """A segment of the store in `folder`, all of whose bytes are what was written."""
    path = verified(folder, segment.name, segment)
    return read_segment(path, manifest, segment.rows)


def read_segment(path: Path, manifest: Manifest, rows: int) -> "SegmentFile":
    """The same for one that this process has just written."""
    with content_of(path, repair(path.parent)):
        return SegmentFile(path, cast(StorageDtype, manifest.storage_dtype), manifest.hidden_size, rows)


class SegmentFile:
    """A memory-mapped segment. Mapped privately: the tensors can be written to, the file cannot.

    `table` is all that the file holds; nothing of it is read before it is used.
    """

    def __init__(self, path: Path, storage_dtype: StorageDtype, hidden_size: int, rows: int):
        self._dtype = TORCH_DTYPES[storage_dtype]
        self._hidden_size = hidden_size
        num_bytes = path.stat().st_size
        # torch keeps no file open for its map, so that thousands of segments can be open at once
        self._map = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8).numpy()
        buffer = pa.py_buffer(self._map)
        self.table = pa.ipc.open_stream(buffer).read_all()
        if len(self.table) != rows:
            raise ValueError(f"{len(self.table)} rows, not {rows}")
        self.table.validate()
        self._num_tokens = self.table["n_tokens"].to_numpy().astype(np.int64)
        states = self.table["encoder_hidden_states"]
        self._starts = _value_starts(states, self._num_tokens * hidden_size * self._dtype.itemsize, buffer)
        self._scale_starts = None
        if storage_dtype == "int8":
            sizes = self._num_tokens * SCALE_DTYPE.itemsize
            self._scale_starts = _value_starts(self.table["scale"], sizes, buffer)

    def column(self, name: str, default: Any = None) -> list[Any]:
        """The values of a column, or `default` for each row of a segment of version 0.1 that has none."""
        if name in self.table.column_names:
            return self.table[name].to_pylist()
        return [default] * len(self.table)

    def rows_as(self, schema: pa.Schema) -> pa.Table:
        """All rows with the columns of a schema. Files of version 0.1 have no positions: all are whole texts."""
        table = self.table
        blank = {"document": pa.array([""] * len(table)), "start": pa.array(np.zeros(len(table), np.int64))}
        for name, column in blank.items():
            if name not in table.column_names:
                table = table.append_column(name, column)
        if "end" not in table.column_names:
            table = table.append_column("end", pc.cast(pc.utf8_length(table["context"]), pa.int64()))
        return table.select(schema.names)

    def value(self, name: str, row: int, default: Any) -> Any:
        """The same for one row."""
        return self.table[name][row].as_py() if name in self.table.column_names else default

    def states(self, row: int) -> torch.Tensor:
        """(n_tokens, hidden_size)"""
        num_tokens = int(self._num_tokens[row])
        states = self._view(self._dtype, num_tokens * self._hidden_size, int(self._starts[row]))
        states = states.view(num_tokens, self._hidden_size)
        if self._scale_starts is None:
            return states
        return dequantize(states, self._view(SCALE_DTYPE, num_tokens, int(self._scale_starts[row])))

    def _view(self, dtype: torch.dtype, count: int, start: int) -> torch.Tensor:
        # not a slice of the map: a loader's worker would send all of that
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)


def _value_starts(column: pa.ChunkedArray, sizes: np.ndarray, buffer: pa.Buffer) -> np.ndarray:
    """The offset in `buffer` of each value, without reading any. Raises `ValueError` for unexpected sizes."""
    starts: list[np.ndarray] = [np.zeros(0, np.int64)]
    lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        chunk_offsets = np.frombuffer(offsets, np.int64)[: len(chunk) + 1]
        starts.append(chunk_offsets[:-1] + (values.address - buffer.address))
        lengths.append(np.diff(chunk_offsets))
    if not np.array_equal(np.concatenate(lengths), sizes):
        raise ValueError("encodings of another hidden size or type")
    return np.concatenate(starts)
