"""Raw rows from files: JSON, JSON lines, CSV, TSV (each plain, gzip or zstd), Parquet and Arrow.

Rows come one at a time, whatever the size of the file, and each knows its place in it.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec

from dssk.data import tables
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.utils import files, streams

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FIRST_PIECE_BYTES = 1 << 20
_SPACES = re.compile(r"[ \t\n\r]*")
# Last character of a value, and the one after it.
_COMPLETE = re.compile(r"[]}\"el][\s\S]|[\s\S][]},: \t\n\r]")


class BadRow(Exception):
    """A row that is not what its schema promises."""


class RawRow(NamedTuple):
    """A row as it was read, or the `BadRow` that says why it could not be."""

    place: str
    """Where to find it: `file:line`, or `file:row` for tables and whole JSON documents."""
    value: Any


def is_data(name: str) -> bool:
    """Whether a file of this name can be read."""
    return streams.plain_name(name).lower().endswith(ENDINGS)


def read_rows(urls: Iterable[str]) -> Iterator[RawRow]:
    """All rows of some files, paths or `hf://` addresses, in order."""
    for url in urls:
        try:
            yield from _file_rows(url)
        except OSError as error:
            if streams.is_damage(error):
                raise DamagedData(f"{url} is damaged: {error}: fetch it again") from error
            raise EnvironmentFault(f"cannot read {url}: {error.strerror or error}") from error


def _file_rows(url: str) -> Iterator[RawRow]:
    name = url.rsplit("/", 1)[-1]
    ending = "." + streams.plain_name(name).lower().rpartition(".")[2]
    if ending in (".parquet", ".arrow"):
        rows: Iterable[tuple[int, Any]] = enumerate(tables.rows(url), start=1)
        yield from (RawRow(f"{name}:{number}", value) for number, value in rows)
        return
    with open_file(url) as file:
        stream = streams.unpacked(file, name)
        if ending in _DELIMITERS:
            rows = _csv_rows(stream, name, _DELIMITERS[ending])
        else:
            rows = _json_rows(stream, name) if ending == ".json" else _json_line_rows(stream)
        yield from (RawRow(f"{name}:{number}", value) for number, value in rows)


def open_file(url: str) -> BinaryIO:
    # A path is opened as it is: `*` and `[1]` in it are ordinary characters.
    return fsspec.open(url, "rb").open() if url.startswith("hf://") else open(url, "rb")  # noqa: SIM115


# --- lines ------------------------------------------------------------------------------------------------------


def _json_line_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(streams.lines(stream), start=1):
        if line is None:
            yield number, BadRow(f"longer than {files.size(streams.MAX_LINE_BYTES)}")
        elif line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    except RecursionError:
        return BadRow("not JSON: nested too deeply")
    except ValueError as error:
        return BadRow(f"not JSON: {error}")


# --- CSV --------------------------------------------------------------------------------------------------------


def _csv_rows(stream: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Rows as dicts of texts; the first line names the columns."""
    csv.field_size_limit(streams.MAX_LINE_BYTES)
    # Strict: a quote that is never closed would else swallow all rows below it in silence.
    reader = csv.reader(_text_lines(stream), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DsskError(f"{name}: a column name stands twice in the first line: rename one")
        for cells in reader:
            if cells:
                yield reader.line_num, _csv_row(header, cells)
    except csv.Error as error:
        raise DsskError(
            f'{name}:{reader.line_num}: {error}: put cells that hold quotes or line ends in "...", and double '
            "the quotes in them"
        ) from error


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells, but {len(header)} columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:  # an escaped byte, see `_text_lines`
        return BadRow("not UTF-8")
    return dict(zip(header, cells, strict=True))


def _text_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 become lone surrogates, so that one bad row costs no others."""
    for line in streams.lines(stream):
        if line is None:
            raise csv.Error(f"a line is longer than {files.size(streams.MAX_LINE_BYTES)}")
        yield line.decode(errors="surrogateescape")


# --- whole JSON documents ---------------------------------------------------------------------------------------


def _json_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """A `.json` file: a list of rows, `{"data": [...]}`, or one or more rows after one another."""
    document = _JsonDocument(stream)
    number = 0
    try:
        for number, row in enumerate(document.rows(), start=1):
            for flat in _squad_questions(row) if isinstance(row, dict) and "paragraphs" in row else [row]:
                yield number, flat
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DsskError(
            f"{name} cannot be read after row {number}: not JSON: {fault}: mend it, or name it .jsonl if each line "
            "is a row"
        ) from error


def _squad_questions(article: dict) -> Iterator[Any]:
    """A SQuAD article as flat rows."""
    try:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield {
                    "id": qa.get("id"),
                    "title": article.get("title"),
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": qa.get("answers", []),
                }
    except (KeyError, TypeError, AttributeError) as error:
        yield BadRow(f"not a SQuAD article: {error!r}")


class _JsonDocument:
    """Reads JSON values one after another, of which only the one at hand is in memory."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[Any]:
        """The elements of lists on the top level and under the key `data` of an object there, and other values."""
        while first := self._peek():
            if first == "[":
                yield from self._elements()
            elif first == "{":
                yield from self._object()
            else:
                yield self._value()

    def _elements(self) -> Iterator[Any]:
        self._take("[")
        for _ in self._entries("]"):
            yield self._value()

    def _object(self) -> Iterator[Any]:
        """The rows under `data` if it is a list, else the object itself."""
        self._take("{")
        members, has_rows = {}, False
        for _ in self._entries("}"):
            key = self._value()
            self._take(":")
            if key == "data" and self._peek() == "[":
                has_rows = True
                yield from self._elements()
            else:
                members[key] = self._value()
        if not has_rows:
            yield members

    def _entries(self, end: str) -> Iterator[None]:
        """Stops before each entry of a list or an object; takes the commas between them, and its `end`."""
        if self._peek() != end:
            yield
            while self._peek() != end:
                self._take(",")
                yield
        self._take(end)

    def _peek(self) -> str:
        """The next character that is no space, an empty text at the end."""
        while True:
            self._at = _SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more(_FIRST_PIECE_BYTES):
                return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise ValueError(f"want {character!r}, got {found!r}" if found else "the file ends too early")
        self._at += 1

    def _value(self) -> Any:
        self._peek()
        piece_bytes = _FIRST_PIECE_BYTES
        while True:
            fault: ValueError | None = None
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                fault = ValueError(error.msg)
            else:
                if self._ended or _COMPLETE.match(self._text, end - 1):  # else a number may go on
                    self._at = end
                    return value
            if len(self._text) - self._at > streams.MAX_LINE_BYTES:
                raise ValueError(f"a value is longer than {files.size(streams.MAX_LINE_BYTES)}, or {fault}")
            if not self._more(piece_bytes) and fault:
                raise fault
            piece_bytes *= 2  # so that all attempts at a long value together cost no more than twice the last

    def _more(self, num_bytes: int) -> bool:
        """Read on, dropping what was taken; False at the end of the file."""
        data = self._stream.read(num_bytes)
        self._ended = not data
        self._text = self._text[self._at :] + self._utf8.decode(data, final=self._ended)
        self._at = 0
        return not self._ended
