"""Libraries of contexts: what is kept, what is refused, and what a killed writer leaves."""

import json
import multiprocessing
import os
import shutil
from functools import partial

import pytest
import torch

from dssk import prompts
from dssk.commands import library as library_command
from dssk.errors import DamagedData, DsskError, Locked
from dssk.inference.base import encode, load_base
from dssk.store import format as store
from dssk.store import library
from dssk.store.library import ContextLibrary
from dssk.utils import files
from tests.conftest import byte_tokenizer, fused, make_base

TEXTS = ["Mill 1 was built in 1701.", "The bridge of Aston is longer than the mill is high.", "Ann."]


@pytest.fixture
def filled(base_path, tmp_path) -> ContextLibrary:
    """Three contexts."""
    filled = ContextLibrary(tmp_path / "library", model=base_path)
    filled.add(TEXTS, ids=["mill", "bridge", "ann"], titles=["A mill", "", ""])
    return filled


def states_of(base_path, text: str) -> torch.Tensor:
    """(S, d)"""
    ids = byte_tokenizer()(prompts.context(text), return_tensors="pt")["input_ids"]
    return encode(load_base(base_path), ids)[0]


def names(opened: ContextLibrary) -> set[str]:
    return {path.name for path in opened.path.iterdir()}


@pytest.mark.parametrize(
    ("storage_dtype", "dtype", "tolerance"),
    [("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 1e-2), ("int8", torch.bfloat16, 2e-2)],
)
def test_what_is_added_comes_back(base_path, tmp_path, storage_dtype, dtype, tolerance):
    opened = ContextLibrary(tmp_path / "library", model=base_path, storage_dtype=storage_dtype)
    assert opened.add(TEXTS[:2], ids=["a", "b"], titles=["A mill", ""]) == ["a", "b"]
    opened.add(TEXTS[2:], ids=["c"])
    for again in (opened, ContextLibrary(opened.path)):
        assert list(again) == ["a", "b", "c"]
        assert [again.get(id).text for id in again] == TEXTS
        assert [again.get(id).title for id in again] == ["A mill", "", ""]
        for id, text in zip(again, TEXTS, strict=True):
            states = again.get(id).encoder_hidden_states
            assert states.dtype == dtype
            expected = states_of(base_path, text)
            assert again.get(id).n_tokens == len(states) == len(expected)
            error = (states.float() - expected).abs().max() / expected.abs().max()
            assert error < tolerance


def test_an_id_that_is_not_given_is_made_from_the_text(filled):
    (id,) = filled.add(["something new"])
    assert id == library.content_id("something new")
    assert id in filled
    with pytest.raises(DsskError, match=f"has a context '{id}'"):
        filled.add(["something new"])


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        (["new", "x"], ["new", "mill"], "has a context 'mill'"),
        (["new", "x"], ["new", "new"], "has a context 'new'"),
        (["new", " \n"], ["new", "blank"], "'blank' is empty"),
        (["new"], ["new", "other"], "1 texts, 2 ids"),
    ],
)
def test_what_cannot_be_added_adds_nothing(filled, texts, ids, message):
    before = names(filled)
    with pytest.raises(DsskError, match=message):
        filled.add(texts, ids)
    assert list(ContextLibrary(filled.path)) == ["mill", "bridge", "ann"]
    assert names(filled) == before


def test_a_context_that_is_removed_is_gone_from_search_and_disk(filled):
    held = filled.get("mill").encoder_hidden_states
    values = held.clone()
    num_bytes = sum(path.stat().st_size for path in filled.path.iterdir())
    assert [hit.id for hit in filled.search("mill", 3)] == ["mill", "bridge"]
    filled.remove(["mill", "ann"])
    assert list(filled) == list(ContextLibrary(filled.path)) == ["bridge"]
    assert [hit.id for hit in filled.search("mill", 3)] == ["bridge"]
    assert filled.search("ann") == []
    assert sum(path.stat().st_size for path in filled.path.iterdir()) < num_bytes
    assert torch.equal(held, values)  # who reads it can go on
    filled.remove("bridge")
    assert len(filled) == 0
    assert names(filled) == {"library.json"}
    assert filled.search("mill") == []
    filled.add(TEXTS[:1], ids=["mill"])
    assert list(filled) == ["mill"]
    with pytest.raises(DsskError, match="no context 'mil' in .*did you mean mill"):
        filled.remove(["mill", "mil"])
    assert "mill" in ContextLibrary(filled.path)


def test_small_segments_are_joined_and_full_ones_left_alone(filled, monkeypatch):
    for number in range(5):
        filled.add([f"number {number}"], ids=[str(number)])
    assert len(names(filled)) == 2
    monkeypatch.setattr(library, "SMALL_BYTES", 0)
    monkeypatch.setattr(library, "SEGMENT_BYTES", 1)
    monkeypatch.setattr("dssk.store.encoder.BATCH_SIZE", 1)
    before = names(filled)
    filled.add(["one more", "and the last"], ids=["more", "last"])
    assert len(names(filled) - before) == 2
    assert before - names(filled) == set()
    assert list(filled) == ["mill", "bridge", "ann", "0", "1", "2", "3", "4", "more", "last"]


def test_long_texts_are_cut_and_say_so(base_path, tmp_path):
    opened = ContextLibrary(tmp_path / "library", model=base_path, maximum_input_length=20)
    opened.add(["short", "x" * 50], ids=["short", "long"])
    assert [(opened.get(id).n_tokens, opened.get(id).truncated) for id in opened] == [(14, False), (20, True)]
    with pytest.raises(DsskError, match="maximum_input_length is 257, more than the 256 positions"):
        ContextLibrary(tmp_path / "other", model=base_path, maximum_input_length=257)


def test_search_ranks_by_shared_words_and_finds_nothing_without_any(filled):
    assert [hit.id for hit in filled.search("when was the mill built", 5)] == ["mill", "bridge"]
    assert [hit.id for hit in filled.search("aston bridge")] == ["bridge"]
    scores = [hit.score for hit in filled.search("mill bridge", 2)]
    assert scores == sorted(scores, reverse=True)
    for question in ("zeppelin", "", "the"):
        assert filled.search(question, 3) == []


def test_a_model_is_known_again_wherever_it_lies_and_another_refused(base_path, filled, tmp_path):
    moved = shutil.copytree(base_path, tmp_path / "moved")
    ContextLibrary(filled.path, model=moved).add(["from elsewhere"], ids=["elsewhere"])
    assert "elsewhere" in ContextLibrary(filled.path)
    other = make_base(tmp_path / "other", seed=1)
    for model in (other, fused_folder(other, tmp_path)):
        with pytest.raises(DsskError, match="contexts were encoded by .*other weights"):
            ContextLibrary(filled.path, model=model)
    filled.check_model(base_path)
    with pytest.raises(DsskError, match="other weights"):
        filled.check_model(other)


def fused_folder(base, tmp_path, **how):
    folder = tmp_path / f"fused-{base.name}-{len(how)}"
    fused(base).save_pretrained(folder, **how)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_fused_model_and_a_checkpoint_encode_as_their_base_does(base_path, filled, tmp_path):
    expected = filled.get("bridge").encoder_hidden_states
    for number, model in enumerate(
        (fused_folder(base_path, tmp_path), fused_folder(base_path, tmp_path, cross_attn_only=True))
    ):
        filled.check_model(model)
        opened = ContextLibrary(tmp_path / str(number), model=model)
        opened.add(TEXTS, ids=["a", "b", "c"])
        assert torch.equal(opened.get("b").encoder_hidden_states, expected)
        opened.check_model(base_path)


def test_a_base_that_was_lost_is_one_line(filled, base_path, tmp_path):
    moved = shutil.copytree(base_path, tmp_path / "moved")
    opened = ContextLibrary(tmp_path / "own", model=moved)
    shutil.rmtree(moved)
    assert ContextLibrary(opened.path).search("mill") == []  # needs no model
    with pytest.raises(DsskError, match="no model at"):
        ContextLibrary(opened.path).add(["text"])


def test_a_store_opens_as_a_library_that_cannot_be_written_to(store_path, base_path):
    opened = ContextLibrary(store_path, model=base_path)
    assert len(opened) == 24
    assert list(opened) == [str(number) for number in range(24)]
    (hit,) = opened.search("who built mill 7")
    assert "Mill 7 was built" in opened.get(hit.id).text
    for row in store.load_rows(store_path)["val"]:
        (id,) = (id for id in opened if opened.get(id).text == row["context"])
        assert torch.equal(opened.get(id).encoder_hidden_states, row["encoder_hidden_states"])
    for write in (lambda: opened.add(["new"]), lambda: opened.remove("1")):
        with pytest.raises(DsskError, match="can only be read"):
            write()


def test_folders_of_something_else_are_left_alone(base_path, tmp_path):
    with pytest.raises(DsskError, match="no library of contexts"):
        ContextLibrary(tmp_path)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(DsskError, match="holds something else"):
        ContextLibrary(tmp_path, model=base_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} - {f".{tmp_path.name}.lock"} == {
        "letter"
    }


def test_damage_is_found_when_it_is_opened(filled):
    (segment,) = filled.path.glob("*.arrow")
    with open(segment, "r+b") as file:
        file.truncate(segment.stat().st_size - 1)
    with pytest.raises(DamagedData, match=segment.name):
        ContextLibrary(filled.path)
    manifest = filled.path / "library.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DsskError, match="has format version 2, this dssk reads 1"):
        ContextLibrary(filled.path)
    manifest.write_text("{}")
    with pytest.raises(DamagedData, match="library.json"):
        ContextLibrary(filled.path)


def test_a_changed_byte_is_found_by_verifying(filled, store_path):
    filled.verify()
    (segment,) = filled.path.glob("*.arrow")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    with pytest.raises(DamagedData, match=f"{segment.name} is damaged, its checksum is another"):
        ContextLibrary(filled.path).verify()
    with pytest.raises(DsskError, match="dssk.data.verify"):
        ContextLibrary(store_path).verify()


def test_only_one_writes_at_a_time_and_nobody_else_s_work_is_lost(filled):
    other = ContextLibrary(filled.path)
    with store.lock(filled.path), pytest.raises(Locked, match="is held by"):
        other.add(["x"])
    other.add(["x"], ids=["x"])
    filled.add(["y"], ids=["y"])
    assert list(filled) == list(ContextLibrary(filled.path)) == ["mill", "bridge", "ann", "x", "y"]
    other.remove("x")
    with pytest.raises(DsskError, match="no context 'x'"):
        filled.remove("x")


def _write_until_killed(path, step: int) -> None:
    """Add and remove; die at the `step`-th moment at which something was made to last."""
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            os._exit(9)
        real(descriptor)

    os.fsync = fsync
    opened = ContextLibrary(path)
    opened.add(["new one", "new two"], ids=["new 1", "new 2"])
    opened.remove("ann")
    os._exit(0)


def test_a_writer_killed_at_any_moment_leaves_all_or_nothing(filled, monkeypatch):
    seen = set()
    for step in range(1, 20):
        copy = shutil.copytree(filled.path, filled.path.with_name(f"copy-{step}"))
        process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(copy, step))
        process.start()
        process.join()
        again = ContextLibrary(copy)
        seen.add(tuple(again))
        for id in again:
            assert again.get(id).encoder_hidden_states.isfinite().all()
        again.add(["after"], ids=["after"])
        segments = {segment.name for segment in again.manifest.segments}
        assert names(again) == {"library.json", *segments}
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    old = ("mill", "bridge", "ann")
    assert seen == {old, (*old, "new 1", "new 2"), ("mill", "bridge", "new 1", "new 2")}


def test_a_full_disk_leaves_the_library_as_it_was(filled, monkeypatch):
    before = names(filled)
    monkeypatch.setattr(
        files.os, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(DsskError, match="disk full"):
        filled.add(["new"])
    monkeypatch.undo()
    assert names(filled) == before
    assert len(ContextLibrary(filled.path)) == 3


@pytest.fixture
def command(run_command):
    return partial(run_command, library_command)


def test_the_command(base_path, tmp_path, command):
    (tmp_path / "mill.txt").write_text(TEXTS[0] + "\n")
    more = tmp_path / "more.jsonl"
    rows = [{"context": TEXTS[1], "id": 7, "title": "Aston"}, {"context": TEXTS[2]}]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "library"
    added = command(folder, "add", tmp_path / "mill.txt", more, "--checkpoint", base_path)
    assert added == command(folder, "list")
    lines = [line.split("\t") for line in added.splitlines()]
    assert [line[0] for line in lines] == ["mill", "7", library.content_id("Ann.")]
    assert lines[1][1:] == ["61 tokens", "Aston"]
    assert "7\t" in command(folder, "search", "aston", "--k", "1")
    assert command(folder, "remove", "7") == ""
    assert "Aston" not in command(folder, "list")
    assert "2 contexts are as they were written" in command(folder, "verify")
    assert "cannot read" in command(folder, "add", tmp_path / "no.txt", code=2)
    more.write_text('{"context": "fine"}\n{"text": "x"}\n')
    assert 'more.jsonl:2: want {"context": text}' in command(folder, "add", more, code=2)
    assert "no library of contexts" in command(tmp_path / "none", "list", code=2)
