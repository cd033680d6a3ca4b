"""Damage of an unfinished store: what goes on from it is as if it had never been interrupted."""

import random
import re
import shutil

import pytest

from dssk.data import encode
from tests.data.conftest import rows, tree, write_jsonl


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, preprocess):
    """A store of 40 contexts with 3 of its 5 shards, its source, and what it would be when finished."""
    folder = tmp_path_factory.mktemp("unfinished")
    source = write_jsonl(folder / "rows.jsonl", rows(40))
    whole = tree(preprocess(folder / "whole", source))
    real = encode.encode_shard

    def encode_some(job, index, *rest):
        if index == 3:
            raise Interrupted
        real(job, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "encode_shard", encode_some)
        with pytest.raises(Interrupted):
            preprocess(folder / "cut", source)
    return folder / "cut", source, whole


def test_every_flipped_byte_is_mended(unfinished, preprocess, tmp_path):
    """40 of 40: found when the command goes on, and made again."""
    cut, source, whole = unfinished
    rng = random.Random(2)
    names = sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert {path.suffix for path in names} == {".arrow", ".json"}
    assert any(".staging" in path.parts for path in names)
    for number in range(40):
        copy = shutil.copytree(cut, tmp_path / str(number))
        path = copy / names[number % len(names)]
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert tree(preprocess(copy, source)) == whole, f"{path} was changed"
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("name", "field"),
    [(".staging/plan.json", "read"), ("contexts/data-00001-of-00005.json", "batch_size")],
)
def test_another_number_is_mended_too(unfinished, preprocess, tmp_path, name, field):
    """One that would be taken for right by its type."""
    cut, source, whole = unfinished
    copy = shutil.copytree(cut, tmp_path / "copy")
    (store,) = (copy / "processed_data").iterdir()
    text = (store / name).read_text()
    (store / name).write_text(re.sub(rf'"{field}": (\d+)', rf'"{field}": 1\1', text))
    assert (store / name).read_text() != text
    assert tree(preprocess(copy, source)) == whole


def test_a_whole_shard_of_other_contexts_is_mended_too(unfinished, preprocess, tmp_path):
    """Both its files fit each other; only its key tells that they are not of this place."""
    cut, source, whole = unfinished
    copy = shutil.copytree(cut, tmp_path / "copy")
    (store,) = (copy / "processed_data").iterdir()
    first, second = sorted((store / "contexts").glob("*.json"))[:2]
    for suffix in (".json", ".arrow"):
        shutil.copy(first.with_suffix(suffix), second.with_suffix(suffix))
    assert tree(preprocess(copy, source)) == whole


def test_files_of_others_stay(unfinished, preprocess, tmp_path):
    cut, source, whole = unfinished
    copy = shutil.copytree(cut, tmp_path / "copy")
    (store,) = (copy / "processed_data").iterdir()
    (store / "contexts" / "notes.txt").write_text("mine")
    (store / ".tmp-mine").write_text("mine")
    (store / "contexts" / "data-00000-of-00004.arrow").write_text("of an older plan")
    done = tree(preprocess(copy, source))
    assert done.pop("contexts/notes.txt") == done.pop(".tmp-mine") == b"mine"
    assert done == whole
