"""Files that are either whole or absent, whenever the process dies; their checksums; one writer to a folder."""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from filelock import FileLock, Timeout

from dssk.errors import DamagedData, DsskError, EnvironmentFault, Locked, short

TEMP_PREFIX = ".tmp-"
_TEMP = re.compile(r"\.tmp-[0-9a-f]{8}(-.*)?")
_PLAIN = re.compile(r"[\w.@+=-]{1,255}", re.ASCII)
_LOCK_SECONDS = 0.2  # long enough to meet the file of a holder that is just going
_BLOCK_BYTES = 1 << 20
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class HashingWriter:
    """A binary file that is only appended to, with the number and the xxh3_128 of the bytes written so far."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = xxhash.xxh3_128()
        self.num_bytes = 0
        self.closed = False  # Arrow asks

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[HashingWriter]:
    """Open `path` for writing; it appears under its name only when the block ends, whole and on the disk."""
    temp = path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        with machine_faults(path):
            with open(temp, "xb") as file:
                yield HashingWriter(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk there is none to remove
            temp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> str:
    """Write a whole text file at once; returns its xxh3_128."""
    with atomic_file(path) as file:
        file.write(text.encode())
    return file.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write a whole JSON file at once, indented; returns its xxh3_128."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, gone when the block ends.

    Call it under a lock: what was left by one that was killed is removed first.
    """
    remove_left(path)
    temp = path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        with machine_faults(path):
            temp.mkdir()
            yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that is renamed to `path` when the block ends, whole and on the disk."""
    with temporary_folder(path) as temp:
        yield temp
        for file in (file for file in temp.rglob("*") if file.is_file()):
            file.chmod(public_mode())
            sync(file)
        os.rename(temp, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder (new, renamed, removed), survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds; one that is absent is fine."""
    with machine_faults(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_left(*paths: Path) -> None:
    """Remove what killed writers of these files or folders left beside them. Call it only under their lock."""
    for path in paths:
        for left in path.parent.glob(f"{TEMP_PREFIX}????????-{glob.escape(path.name)}"):
            remove(left)


def remove_temps(folder: Path) -> None:
    """Remove what writers that were killed left in `folder` and its folders. Call it only under the folder's lock."""
    for pattern in (f"{TEMP_PREFIX}*", f"*/{TEMP_PREFIX}*"):
        for path in folder.glob(pattern):
            if _TEMP.fullmatch(path.name) and not path.parent.is_symlink():
                remove(path)


def is_plain(name: object) -> bool:
    """Whether a name that was read from a file is a relative path of plain names, without `.` and `..`."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return all(_PLAIN.fullmatch(part) and part not in (".", "..") for part in parts)


def inside(folder: Path, name: object) -> Path:
    """The path of `name`, as it was read from a file, inside `folder`: the only way to use such a name.

    Raises `DamagedData` unless it is a plain relative name and no symbolic link leads it out of the folder.
    """
    if is_plain(name):
        path = folder / str(name)
        with contextlib.suppress(OSError, RuntimeError):  # links in a circle
            if path.resolve().is_relative_to(folder.resolve()):
                return path
    raise DamagedData(f"{folder} is damaged: {str(name)[:80]!r} is not the name of a file in it")


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, and make sure that it can be written to."""
    try:
        with machine_faults(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # without a name, where there can be such files
                pass
    except OSError as error:  # such as a name that is too long, or a file system that takes no folders
        raise EnvironmentFault(f"cannot write {folder}: {error.strerror}: choose another folder") from error


def public_mode() -> int:
    """The mode that a new file gets by the umask."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def require_free(folder: Path, num_bytes: int, what: str) -> None:
    """Raise `EnvironmentFault` unless the disk of `folder` has `num_bytes` free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise EnvironmentFault(
            f"disk full at {folder}: {what} needs {size(num_bytes)}, {size(free)} free: make room or choose "
            "another folder, then start the same command again"
        )


@contextlib.contextmanager
def machine_faults(path: Path) -> Iterator[None]:
    """Turn a full disk and a target that may not be written to into an `EnvironmentFault` that names `path`."""
    try:
        yield
    except Exception as error:
        # Libraries in Rust have errors of their own, and say so in the text.
        if getattr(error, "errno", None) in _FULL or "os error 28" in str(error):
            free = shutil.disk_usage(path.parent).free
            raise EnvironmentFault(
                f"disk full at {path} ({size(free)} free): make room, then start the same command again"
            ) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in _NOT_ALLOWED:
            raise EnvironmentFault(f"cannot write {path}: {error.strerror}: choose another folder") from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise DsskError(f"cannot write {path}: {error.strerror}") from error
        raise


@contextlib.contextmanager
def content_of(path: Path, remedy: str = "bring it back from a copy") -> Iterator[None]:
    """Turn whatever a library raises while it reads `path` into `DamagedData`.

    For files whose checksums fit: they are as somebody wrote them, which need not have been us.
    """
    try:
        yield
    except (DsskError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {short(error, 150)}"
        raise DamagedData(f"{path} does not hold what it should ({reason}): {remedy}") from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, or raise `Locked` naming the process that does. The kernel frees it at our death."""
    held = FileLock(path)
    with machine_faults(path):
        try:
            held.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise Locked(f"{path} is held by {_holder(path)}: wait for it to end, or stop it") from error
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path.write_text(json.dumps(me))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: whoever waits for this file sees that it is gone
        held.release()


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Be the only process that writes the file or folder `path`; the lock lies beside it."""
    path = Path(os.path.abspath(path))  # `.` has a name, too
    if not path.name:
        raise DsskError(f"cannot write {path}: choose another folder")
    make_folder(path.parent)
    with lock(path.with_name(f".{path.name}.lock")):
        yield


def _holder(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[:200] or "another process"
    except OSError:
        return "another process"


def xxh3_128(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> str:
    """The xxh3_128 of a whole file, as 32 hex digits; `progress` is told the bytes of each block."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def size(num_bytes: float) -> str:
    """`num_bytes` for people: `"1.5 GB"`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
