"""Checksums that are paid once a file, and never survive a change of it."""

import os
import subprocess
import sys
import time

import pytest

from dssk.utils import files, hashes
from tests.conftest import REPOSITORY


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache" / "dssk" / "hashes.jsonl"


def forget(monkeypatch):
    """As another process begins."""
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "_log_read", (0, 0))


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that was written long ago: the clock goes on by a minute."""
    path = tmp_path / "file"
    path.write_bytes(b"content" * 1000)
    now = time.time
    monkeypatch.setattr(hashes.time, "time", lambda: now() + 60)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files that were read whole."""
    read = []
    real = files.xxh3_128
    monkeypatch.setattr(files, "xxh3_128", lambda path, *rest: read.append(path) or real(path, *rest))
    return read


def test_a_file_is_read_once_by_all_processes(cache, settled, reads, monkeypatch):
    expected = hashes.xxh3_128(settled)
    told = []
    assert hashes.xxh3_128(settled, told.append) == expected
    forget(monkeypatch)
    assert hashes.xxh3_128(settled) == expected
    assert reads == [settled]
    assert told == [7000]
    assert expected == files.xxh3_128(settled)
    code = "import sys; from pathlib import Path; from dssk.utils import files, hashes\n"
    code += "files.xxh3_128 = None; print(hashes.xxh3_128(Path(sys.argv[1])))"
    said = subprocess.check_output([sys.executable, "-c", code, str(settled)], cwd=REPOSITORY, text=True)
    assert said.strip() == expected


def test_any_change_is_seen(cache, settled, reads):
    first = hashes.xxh3_128(settled)
    times = settled.stat()
    for content in (b"content" * 999 + b"Content", b"contenT" + b"content" * 999):
        settled.write_bytes(content)
        os.utime(settled, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and rsync do
        assert hashes.xxh3_128(settled) != first
    other = settled.with_name("other")
    other.write_bytes(b"x" * 7000)
    os.replace(other, settled)
    assert hashes.xxh3_128(settled) == files.xxh3_128(settled)


def test_a_file_that_was_just_written_is_not_remembered(cache, tmp_path, reads):
    path = tmp_path / "young"
    path.write_bytes(b"x")
    hashes.xxh3_128(path)
    hashes.xxh3_128(path)
    assert reads == [path, path]
    assert not cache.exists()


def test_a_damaged_or_foreign_line_is_ignored(cache, settled, reads, monkeypatch):
    expected = hashes.xxh3_128(settled)
    line = cache.read_bytes()
    for position in range(len(line)):
        changed = bytearray(line)
        changed[position] ^= 1
        cache.write_bytes(b'null\n[1]\n{"a": \xff\n' + changed)
        forget(monkeypatch)
        assert hashes.xxh3_128(settled) == expected
    cache.write_bytes(line[:-30])  # torn
    forget(monkeypatch)
    hashes.xxh3_128(settled)
    assert reads[-1] == settled


def test_a_cache_that_cannot_be_written_costs_time_only(settled, reads, monkeypatch, tmp_path):
    forget(monkeypatch)
    (tmp_path / "file-no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file-no-folder"))
    assert hashes.xxh3_128(settled) == files.xxh3_128(settled)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by the specification: as if unset
    assert hashes.cache_file().is_absolute()


def test_the_log_does_not_grow_for_ever(cache, settled, monkeypatch):
    monkeypatch.setattr(hashes, "_MAX_LOG_BYTES", 5000)
    for number in range(100):
        hashes.cached(f"kind {number}", settled, lambda: "value")
    assert cache.stat().st_size < 5500
    forget(monkeypatch)
    assert hashes.cached("kind 99", settled, lambda: "again") == "value"
    assert hashes.cached("kind 0", settled, lambda: "again") == "again"
