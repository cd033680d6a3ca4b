"""Text files as users have them: plain, gzip or zstd, with or without a byte-order mark, read as streams.

Decompression bombs are harmless: only a piece is decompressed at a time, and no line may exceed a limit.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO, cast

import pyarrow as pa

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_LINE_BYTES = 64 << 20  # whole pages of Wikipedia as HTML and as tokens are a few MB
_BUFFER_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


def plain_name(name: str) -> str:
    """A file's name without the ending that says how it is compressed."""
    for ending in COMPRESSIONS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """The bytes of `file`, decompressed if its `name` says so, as a stream.

    Reading raises a plain `OSError` without `errno` where compressed data is damaged or cut.
    """
    ending = name[len(plain_name(name)) :].lower()
    if not ending:
        return file
    return cast(
        BinaryIO, io.BufferedReader(pa.CompressedInputStream(file, COMPRESSIONS[ending]), _BUFFER_BYTES)
    )


def is_damage(error: OSError) -> bool:
    """Whether reading `unpacked` failed for what is in the file, not for the machine."""
    return type(error) is OSError and error.errno is None


def lines(stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes | None]:
    """The lines of a stream with their ends, without a byte-order mark; None for one longer than `max_bytes`."""
    line = stream.readline(max_bytes).removeprefix(_BOM)
    while line:
        if len(line) < max_bytes or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(max_bytes)
            yield None
        line = stream.readline(max_bytes)
