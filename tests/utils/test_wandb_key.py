import os
import subprocess
import sys
from pathlib import Path

import pytest

from dssk.errors import DsskError
from dssk.utils.wandb_key import KEY_FILE_VARIABLE, find_key, give_key_to_wandb, read_key, write_key
from tests.conftest import REPOSITORY

KEY = "c4n4ry" * 6 + "0123"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home without any key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path


def netrc(home: Path, key: str = KEY, host: str = "api.wandb.ai") -> None:
    (home / ".netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
    (home / ".netrc").chmod(0o600)


def test_the_environment_comes_before_netrc_and_netrc_is_asked_for_wandbs_host(home, monkeypatch):
    assert find_key() is None
    netrc(home)
    assert find_key() == KEY
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert find_key() is None
    monkeypatch.setenv("WANDB_API_KEY", "other")
    assert find_key() == "other"


def test_the_script_writes_a_file_for_its_owner_and_says_nothing_of_the_key(home, tmp_path):
    netrc(home)
    script = tmp_path / "copy_wandb_key.sh"
    script.write_bytes((REPOSITORY / script.name).read_bytes())
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(home)}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-x", str(script)], env=environment, capture_output=True, text=True, umask=0
    )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    file = tmp_path / ".wandb_key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_key(file) == KEY


def test_the_key_file_is_ignored_by_git_and_by_the_copy_of_the_code():
    ignored = subprocess.run(["git", "check-ignore", ".wandb_key"], cwd=REPOSITORY, capture_output=True)
    assert ignored.returncode == 0
    assert ".*" in (REPOSITORY / ".havenignore").read_text().splitlines()


def test_writing_again_replaces_the_key_even_under_a_loose_umask(home):
    file = home / "key"
    before = os.umask(0)
    try:
        for key in (KEY, "second"):
            netrc(home, key)
            write_key(file)
    finally:
        os.umask(before)
    assert read_key(file) == "second"
    assert file.stat().st_mode & 0o777 == 0o600


def test_no_key_is_one_line_with_the_remedy(home):
    with pytest.raises(DsskError, match="set WANDB_API_KEY, or run `wandb login`"):
        write_key(home / "key")


def test_links_loose_modes_and_folders_are_refused_for_writing_and_reading(home):
    netrc(home)
    loose, link, folder = home / "loose", home / "link", home / "folder"
    loose.write_text("old")
    loose.chmod(0o644)
    link.symlink_to(home / "elsewhere")
    folder.mkdir(mode=0o700)
    mine, link_to_mine, group = home / "mine", home / "link_to_mine", home / "group"
    for path, mode in ((mine, 0o600), (group, 0o640)):
        path.write_text("old")
        path.chmod(mode)
    link_to_mine.symlink_to(mine)
    for path in (loose, link, folder, link_to_mine, group):
        for action in (write_key, read_key):
            with pytest.raises(DsskError, match=str(path)):
                action(path)
    assert loose.read_text() == "old"
    assert not (home / "elsewhere").exists()


def test_a_file_of_someone_else_is_refused(home, monkeypatch):
    netrc(home)
    write_key(home / "key")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(DsskError, match="not a file of yours"):
        read_key(home / "key")


def test_the_script_finds_the_python_beside_it_when_none_is_on_the_path(home, tmp_path):
    netrc(home)
    script, python = tmp_path / "copy_wandb_key.sh", tmp_path / ".venv" / "bin" / "python"
    script.write_bytes((REPOSITORY / script.name).read_bytes())
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    environment = {"PATH": str(tools), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_key(tmp_path / ".wandb_key") == KEY


def test_a_target_that_git_tracks_is_refused(home):
    netrc(home)
    file = home / ".wandb_key"
    file.touch(mode=0o600)
    for command in (["init", "-q"], ["add", "-f", ".wandb_key"]):
        subprocess.run(["git", *command], cwd=home, check=True)
    with pytest.raises(DsskError, match="tracked by git"):
        write_key(file)
    assert file.read_text() == ""


@pytest.mark.parametrize(("rank", "given"), [("0", True), ("1", False)])
def test_a_job_reads_the_key_on_its_first_rank_only(home, monkeypatch, rank, given):
    netrc(home)
    write_key(home / "key")
    (home / ".netrc").unlink()
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(home / "key"))
    monkeypatch.setenv("RANK", rank)
    give_key_to_wandb()
    assert os.environ.pop("WANDB_API_KEY", None) == (KEY if given else None)


def test_a_key_of_the_jobs_own_comes_before_the_file(home, monkeypatch):
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(home / "absent"))
    monkeypatch.setenv("WANDB_API_KEY", "own")
    give_key_to_wandb()
    assert os.environ["WANDB_API_KEY"] == "own"
