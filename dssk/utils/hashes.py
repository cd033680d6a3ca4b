"""Checksums of files, cached for the user: an unchanged file is read only once.

The key is the file's path, device, inode, size and times. The cache is a log of lines that are only appended, so that
processes need no lock and a torn line harms nothing; where it cannot be written, files are read again.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from dssk.utils import files

_RECENT_SECONDS = 2  # a file this young may change again without another time
_MAX_LOG_BYTES = 4_000_000

_known: dict[str, str] = {}
_log_read = (0, 0)  # inode of the log, and bytes of it that are in `_known`


def xxh3_128(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> str:
    """The xxh3_128 of a whole file; `progress` is told its bytes as they are read, or all at once."""
    num_bytes_told = 0

    def tell(num_bytes: int) -> None:
        nonlocal num_bytes_told
        num_bytes_told += num_bytes
        progress(num_bytes)

    value = cached("xxh3_128", path, lambda: files.xxh3_128(path, tell))
    if not num_bytes_told:
        progress(path.stat().st_size)
    return value


def cached(kind: str, path: Path, compute: Callable[[], str]) -> str:
    """The result of `compute` for the content of `path`, from the cache if the file is unchanged since."""
    key = _key(kind, path)
    if key not in _known:
        _read_log()
    if key in _known:
        return _known[key]
    value = compute()
    if _key(kind, path) == key and _is_settled(path):
        _known[key] = value
        # A disk may be full or read-only, a user may have no home.
        with contextlib.suppress(OSError, RuntimeError):
            _append(key, value)
    return value


def cache_file() -> Path:
    """`$XDG_CACHE_HOME/dssk/hashes.jsonl`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "dssk" / "hashes.jsonl"


def _key(kind: str, path: Path) -> str:
    real = path.resolve()
    stat = real.stat()
    return json.dumps(
        [kind, str(real), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    )


def _is_settled(path: Path) -> bool:
    stat = path.stat()
    return max(stat.st_mtime, stat.st_ctime) < time.time() - _RECENT_SECONDS


def _read_log() -> None:
    """Take in what was appended, by any process, since it was read last."""
    global _log_read
    with contextlib.suppress(OSError, RuntimeError), open(cache_file(), "rb") as log:
        stat = os.fstat(log.fileno())
        inode, start = _log_read if _log_read[0] == stat.st_ino else (stat.st_ino, 0)
        log.seek(start)
        content = log.read()
        for line in content.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                key, value, check = json.loads(line)
                if check == _check(key, value):
                    _known[key] = value
        _log_read = (inode, start + content.rfind(b"\n") + 1)


def _append(key: str, value: str) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = json.dumps([key, value, _check(key, value)]).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
        too_large = os.fstat(descriptor).st_size > _MAX_LOG_BYTES
    finally:
        os.close(descriptor)
    if too_large:  # the older half goes
        lines = path.read_text().splitlines(keepends=True)
        files.write_text(path, "".join(lines[len(lines) // 2 :]))


def _check(key: str, value: str) -> str:
    return xxhash.xxh3_64_hexdigest((key + value).encode())
