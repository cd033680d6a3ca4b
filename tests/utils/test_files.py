"""Publishing whole files, locks and sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dssk.errors import DamagedData, DsskError, EnvironmentFault, Locked
from dssk.utils import files
from tests.conftest import REPOSITORY


def test_a_published_file_appears_whole_with_its_hash(tmp_path):
    path = tmp_path / "a.bin"
    with files.atomic_file(path) as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
        assert not path.exists()
    assert path.read_bytes() == b"one two"
    assert file.num_bytes == 7
    assert file.hexdigest() == files.xxh3_128(path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def write_half():
        with files.atomic_file(path) as file:
            file.write(b"ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_and_name_are_on_the_disk_before_the_block_ends(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or real_fsync(fd)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or real_replace(a, b))
    files.write_text(tmp_path / "a", "x")
    assert [os.path.basename(step)[:5] for step in done] == [".tmp-", "renam", tmp_path.name[:5]]


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match="cannot write"):
        files.make_folder(tmp_path / "file" / "folder")


def test_too_little_room_is_named_with_both_sizes(tmp_path):
    files.require_free(tmp_path, 1, "a byte")
    with pytest.raises(EnvironmentFault, match=r"a galaxy needs 1000000.0 TB, .* free"):
        files.require_free(tmp_path, 10**18, "a galaxy")


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path):
    code = "import sys, time; from dssk.utils import files\nwith files.lock(__import__('pathlib').Path(sys.argv[1])):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()

    def take():
        with files.lock(tmp_path / "lock"):
            pass

    with pytest.raises(Locked, match=f'"pid": {holder.pid}'):
        take()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    take()


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3e12, "3.0 TB")]
)
def test_sizes_are_readable(num_bytes, text):
    assert files.size(num_bytes) == text


def test_a_lock_leaves_no_file_and_names_no_name_twice(tmp_path):
    """The file goes while the lock is held, so a waiter must not take the one that is gone for the lock."""
    path = tmp_path / "lock"
    with files.lock(path):
        with pytest.raises(Locked, match="is held by"), files.lock(path):
            pass
        assert path.exists()
    assert not path.exists()
    with files.lock(path), open(path) as held:
        assert os.fstat(held.fileno()).st_nlink == 1


def test_many_processes_are_never_in_a_lock_together(tmp_path):
    code = """
import sys, time
from pathlib import Path
from dssk.errors import Locked
from dssk.utils import files
folder, entered = Path(sys.argv[1]), 0
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        with files.lock(folder / "lock"):
            (folder / "inside").mkdir()  # fails where another is
            entered += 1
            (folder / "inside").rmdir()
    except Locked:
        pass
print(entered)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(4)]
    entered = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(entered) > 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../victim", "/etc/passwd", "a/../../victim", ".", "..", "", "a//b", "a\\b", "a\0b", 5, None, "x" * 300],
)
def test_a_name_from_a_file_never_leads_outside(tmp_path, name):
    with pytest.raises(DamagedData, match="is not the name of a file in it"):
        files.inside(tmp_path, name)


def test_links_never_lead_outside(tmp_path):
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "in").symlink_to(folder / "part")
    for name in ("out", "out/victim", "circle"):
        with pytest.raises(DamagedData, match="is not the name of a file in it"):
            files.inside(folder, name)
    assert files.inside(folder, "in/data-0.arrow") == folder / "in" / "data-0.arrow"
    (tmp_path / "link").symlink_to(folder)
    assert files.inside(tmp_path / "link", "part/a") == tmp_path / "link" / "part" / "a"


def test_only_our_own_temporary_files_are_removed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "contexts").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    ours = [folder / ".tmp-0123abcd-a", folder / "contexts" / ".tmp-0123abcd"]
    others = [folder / ".tmp-mine", folder / "tmp-0123abcd", tmp_path / "other" / ".tmp-0123abcd-a"]
    for path in ours + others:
        path.touch()
    files.remove_temps(folder)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_what_killed_writers_of_a_file_left_is_removed_and_nothing_of_others(tmp_path):
    ours = [tmp_path / ".tmp-0123abcd-a.png", tmp_path / ".tmp-0123abcd-b[1].png"]
    others = [
        tmp_path / ".tmp-0123abcd-ba.png",
        tmp_path / ".tmp-mine-a.png",
        tmp_path / ".tmp-0123abcd-b1.png",
    ]
    for path in ours + others:
        path.touch()
    files.remove_left(tmp_path / "a.png", tmp_path / "b[1].png", tmp_path / "nowhere" / "c.png")
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)


def test_every_folder_has_a_writer_whatever_it_is_called(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (".", "../folder", folder):
        with files.only_writer(Path(name)):
            assert [path.name for path in tmp_path.glob(".*")] == [".folder.lock"]
    with pytest.raises(DsskError, match="cannot write /: choose another"), files.only_writer(Path("/")):
        pass
