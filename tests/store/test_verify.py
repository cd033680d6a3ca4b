"""Damage of any kind is found, named, and mended by making again just what was damaged."""

import random
import shutil

import pyarrow as pa
import pytest

from dssk.commands import verify as command
from dssk.errors import DamagedData, DsskError, exit_code_of
from dssk.store import verify
from dssk.store.dataset import load_rows
from dssk.store.library import ContextLibrary
from dssk.utils import files
from tests.data.conftest import stamps, tree


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of a finished store, to be damaged."""
    return shutil.copytree(finished, tmp_path / "processed_data" / finished.name)


def test_a_finished_store_is_as_written(finished, capsys):
    assert exit_code_of(lambda: command.main([str(finished)])) == 0
    assert capsys.readouterr().out.endswith("all as written.\n")


def test_every_bit_flip_anywhere_is_found(damaged):
    rng = random.Random(0)
    paths = sorted(path for path in damaged.rglob("*") if path.is_file())
    for _ in range(300):
        path = rng.choice(paths)
        content = path.read_bytes()
        position = rng.randrange(len(content))
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DsskError):
            verify.check(damaged)
        path.write_bytes(content)
    verify.check(damaged)


def test_processes_that_share_the_work_find_all_damage(damaged):
    for path in [path for path in damaged.rglob("*") if path.is_file() and path.name != "manifest.json"]:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert [_finds_damage(damaged, rank, 3) for rank in range(3)].count(True) == 1
        path.write_bytes(content)


def _finds_damage(folder, rank: int, size: int) -> bool:
    try:
        verify.check(folder, rank, size)
    except DamagedData:
        return True
    return False


def test_every_cut_of_a_shard_is_found_on_opening(damaged):
    path = damaged / "contexts" / "data-00003-of-00005.arrow"
    content = path.read_bytes()
    cuts = {*range(0, len(content), 512), *_ends_of_batches(content), len(content) - 1}
    assert len(cuts) > 30
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(DamagedData, match=r"data-00003-of-00005.arrow"):
            load_rows(damaged)


def _ends_of_batches(content: bytes) -> list[int]:
    """Where Arrow would read a shorter table without a word."""
    source = pa.BufferReader(content)
    reader = pa.ipc.open_stream(source)
    ends = []
    for _ in reader:
        ends.append(source.tell())
    return ends


def test_a_missing_file_is_named(damaged, capsys):
    (damaged / "train" / "state.json").unlink()
    assert exit_code_of(lambda: command.main([str(damaged)])) == 4
    assert "1 of 19 files" in (error := capsys.readouterr().err)
    assert "train/state.json is missing" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "num_encoded"),
    [
        (["contexts/data-00001-of-00005.arrow"], 1),
        (["contexts/data-00001-of-00005.json", "contexts/data-00004-of-00005.arrow"], 2),
        (["train/data-00000-of-00001.arrow", "contexts/state.json", "dataset_dict.json"], 0),
        (["manifest.json"], 0),
        (["manifest.json", "contexts/data-00000-of-00005.arrow"], 1),
    ],
)
def test_what_is_discarded_is_made_again_and_nothing_else(
    finished, damaged, preprocess, capsys, names, num_encoded
):
    for name in names:
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
    before = stamps(damaged.glob("contexts/data-*.arrow"))
    with pytest.raises(DsskError):
        verify.check(damaged)
    assert exit_code_of(lambda: command.main([str(damaged), "--discard"])) == 0
    source = finished.parent.parent / "rows.jsonl"
    preprocess(damaged.parent.parent, source)
    assert tree(damaged) == tree(finished)
    after = stamps(before)
    assert sum(after[path] != before[path] for path in before) == num_encoded
    verify.check(damaged)


def test_discarding_from_a_sound_store_costs_only_its_manifest(finished, damaged, preprocess):
    assert exit_code_of(lambda: command.main([str(damaged), "--discard"])) == 0
    assert tree(damaged).keys() == tree(finished).keys() - {"manifest.json"}


def test_a_folder_that_is_no_store_is_named(tmp_path, capsys):
    assert exit_code_of(lambda: command.main([str(tmp_path / "nowhere")])) == 2
    assert exit_code_of(lambda: command.main([str(tmp_path / "nowhere"), "--discard"])) == 2
    assert capsys.readouterr().err.count("no such folder") == 2


def test_discarding_never_empties_a_library(base_path, tmp_path, capsys):
    """Also where its manifest is lost, and its segments have no JSON beside them."""
    library = ContextLibrary(tmp_path / "library", base_path)
    library.add(["a mill"])
    for _ in range(2):
        assert exit_code_of(lambda: command.main([str(library.path), "--discard"])) == 2
        assert "nothing in it can be made again" in capsys.readouterr().err
        assert list(library.path.glob("contexts/*.arrow"))
        (library.path / "manifest.json").write_text("{}")


def test_a_file_that_was_verified_is_read_again_by_the_command_alone(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dssk.utils.hashes._is_settled", lambda path: True)
    verify.check(finished)
    read = []
    real = files.xxh3_128
    monkeypatch.setattr(files, "xxh3_128", lambda path, *rest: read.append(path) or real(path, *rest))
    verify.check(finished)
    assert read == []
    command.main([str(finished)])
    assert len(read) == len(verify.check(finished).all_files)
