"""Contexts for a library: texts as they are, and rows of tables."""

from pathlib import Path
from typing import Any, NamedTuple

from dssk.data.readers import BadRow, is_data, open_file, read_rows
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.store.library import content_id
from dssk.utils import files, streams

TEXT_COLUMNS = ("context", "text")  # the first that a row has


class ContextRow(NamedTuple):
    """A context that is to be encoded."""

    id: str
    title: str
    text: str


def read_contexts(path: str | Path) -> list[ContextRow]:
    """The context of a text file, whose name becomes its id, or those of a file that holds rows.

    Raises `DsskError` if there is none.
    """
    found = _rows(str(path)) if is_data(str(path)) else [_text(Path(path))]
    if not any(row.text.strip() for row in found):
        raise DsskError(f"{path} holds no context")
    return found


def _text(path: Path) -> ContextRow:
    try:
        with open_file(str(path)) as file:
            content = streams.unpacked(file, path.name).read(streams.MAX_LINE_BYTES + 1)
    except OSError as error:
        if streams.is_damage(error):
            raise DamagedData(f"{path} is damaged: {error}: fetch it again") from error
        fault = DsskError if isinstance(error, FileNotFoundError | IsADirectoryError) else EnvironmentFault
        raise fault(f"cannot read {path}: {error.strerror}") from error
    if len(content) > streams.MAX_LINE_BYTES:
        raise DsskError(f"{path} is longer than {files.size(streams.MAX_LINE_BYTES)}: divide it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DsskError(f"cannot read {path}: not UTF-8 at byte {error.start}") from error
    return ContextRow(Path(streams.plain_name(path.name)).stem, "", text.strip())


def _rows(path: str) -> list[ContextRow]:
    if not Path(path).is_file():
        raise DsskError(f"cannot read {path}: no such file")
    return [_row(place, value) for place, value in read_rows([path])]


def _row(place: str, value: Any) -> ContextRow:
    if isinstance(value, BadRow):
        raise DsskError(f"{place}: {value}")
    column = next((name for name in TEXT_COLUMNS if isinstance(value, dict) and name in value), None)
    if column is None or not isinstance(value[column], str):
        wanted = f"a text as {' or '.join(map(repr, TEXT_COLUMNS))}"
        raise DsskError(f"{place}: want {wanted}, with 'id' and 'title' at will")
    text, id, title = value[column], value.get("id"), value.get("title")
    try:
        row = ContextRow(str(content_id(text) if id in (None, "") else id), str(title or ""), text)
        "".join(row).encode()
    except UnicodeEncodeError:  # JSON can say half a character
        raise DsskError(f"{place}: a lone surrogate, which is no text") from None
    return row
