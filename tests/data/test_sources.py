"""Which rows are meant: files, folders, their splits, the Hub, and rows made on the spot."""

import os

import pytest

from dssk.data import sources as sources_module
from dssk.data.sources import Source
from dssk.errors import DsskError, EnvironmentFault
from tests.data.conftest import rows, write_jsonl
from tests.data.test_readers import read


@pytest.mark.parametrize("name", ["a b", "é日本", "[1]", "a*", "50%", 'it\'s "q"', "line\nbreak", "-r"])
def test_any_file_name_is_opened_as_it_is(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_jsonl(folder / f"{name}.jsonl", rows(1))
    assert len(read(folder / f"{name}.jsonl")) == 2
    assert len(list(Source(str(folder)).open()["all"])) == 2


def test_folders_and_files_named_after_splits_are_splits(tmp_path):
    for name in ("train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "test/a.jsonl", "train/dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows(1, 1))
    counted = {split: len(list(found)) for split, found in Source(str(tmp_path)).open().items()}
    assert counted == {"train": 2, "val": 1}
    assert len(list(Source(str(tmp_path), split="test").open()["all"])) == 1
    with pytest.raises(DsskError, match="no split other, only test, train, val"):
        Source(str(tmp_path), split="other").open()


def test_val_can_come_from_another_place(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(3))
    write_jsonl(tmp_path / "b.jsonl", rows(1))
    found = Source(str(tmp_path / "a.jsonl"), val_dataset=str(tmp_path / "b.jsonl")).open()
    assert {split: len(list(part)) for split, part in found.items()} == {"train": 6, "val": 2}


@pytest.mark.parametrize("name", ["/no/such/file", "./missing", "missing.jsonl", "a/b/c"])
def test_a_path_that_is_not_there_is_named_without_asking_the_hub(name):
    with pytest.raises(DsskError, match="no such file or folder"):
        Source(name).open()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DsskError, match="no data in"):
        Source(str(tmp_path)).open()


def test_a_changed_file_changes_the_description(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    before = Source(str(path)).describe()
    assert before == Source(str(path)).describe()
    write_jsonl(path, rows(3, start=1))
    assert before != Source(str(path)).describe()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + ".jsonl"])
def test_a_name_that_no_file_can_have_is_one_short_line(name):
    assert "dataset_contents" not in Source(name + "/" * 3).describe()
    with pytest.raises(DsskError) as caught:
        Source(name + "/" * 3).open()
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_a_file_that_may_not_be_read_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(sources_module, "file_fingerprint", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*: Permission denied"):
        Source(str(write_jsonl(tmp_path / "a.jsonl", rows(1)))).describe()


def test_rows_can_be_made_on_the_spot():
    made = Source(
        "mine", max_examples=2, seed=7, makers={"mine": lambda most, seed: {"train": [{"a": seed}] * most}}
    )
    assert [tuple(row) for row in made.open()["train"]] == [
        ("mine train:1", {"a": 7}),
        ("mine train:2", {"a": 7}),
    ]
    assert made.describe()["seed"] == 7
    assert "seed" not in Source("mine").describe()
    assert made.commits() == {}


def test_columns_are_part_of_the_description_and_only_fields_have_any(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"passage": "c", "question": "q", "answer": "a"}]))
    source = Source(path, columns={"question": "question", "context": "passage"})
    assert [row.value["context"] for row in source.open()["all"]] == ["c"]
    assert source.describe() == Source(path).describe() | {"columns": "context=passage,question=question"}
    with pytest.raises(DsskError, match="no field kontext to name a column for, want id, title, context"):
        Source(path, columns={"kontext": "c"})
