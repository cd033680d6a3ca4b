"""Publishing whole files, locks and sizes."""

import os
import subprocess
import sys

import pytest

from dssk.errors import EnvironmentFault, Locked
from dssk.utils import files
from tests.conftest import REPOSITORY


def test_a_published_file_appears_whole_with_its_hash(tmp_path):
    path = tmp_path / "a.bin"
    with files.publish(path) as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
        assert not path.exists()
    assert path.read_bytes() == b"one two"
    assert file.num_bytes == 7
    assert file.hexdigest() == files.xxh3_128(path)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.publish_text(path, "old")

    def write_half():
        with files.publish(path) as file:
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
    files.publish_text(tmp_path / "a", "x")
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
    code = "import sys, time; from dssk import files\nwith files.lock(__import__('pathlib').Path(sys.argv[1])):\n"
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
