"""Libraries of contexts: what is kept, what is refused, and what a killed writer leaves."""

import itertools
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dssk import prompts
from dssk.errors import DamagedData, DsskError, Locked
from dssk.inference.encoding import encode
from dssk.inference.loading import load_base
from dssk.inference.passages import Splitter
from dssk.store import library, verify
from dssk.store.dataset import load_rows
from dssk.store.library import ContextLibrary
from dssk.store.manifest import FileInfo
from dssk.store.opening import load_manifest
from dssk.store.search import WordIndex, search
from dssk.store.segments import SegmentFile
from dssk.utils import files
from tests.conftest import byte_tokenizer, fused, make_base
from tests.faults.mutations import reseal_store

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
    return encode(load_base(base_path), ids, torch.ones_like(ids))[0]


def names(opened: ContextLibrary) -> set[str]:
    """Every file, but those of the index, which each change makes anew."""
    found = (path for path in opened.path.rglob("*") if path.is_file() and path.parent.name[:7] != "search-")
    return {path.relative_to(opened.path).as_posix() for path in found}


def segments(opened: ContextLibrary) -> list[Path]:
    return sorted(opened.path.glob("contexts/*.arrow"))


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
    num_bytes = sum(path.stat().st_size for path in segments(filled))
    assert [hit.id for hit in filled.search("mill", 3)] == ["mill", "bridge"]
    filled.remove(["mill", "ann"])
    assert list(filled) == list(ContextLibrary(filled.path)) == ["bridge"]
    assert [hit.id for hit in filled.search("mill", 3)] == ["bridge"]
    assert filled.search("ann") == []
    assert sum(path.stat().st_size for path in segments(filled)) < num_bytes
    assert torch.equal(held, values)  # who reads it can go on
    filled.remove("bridge")
    assert len(filled) == 0
    assert names(filled) == {"manifest.json"}
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


LONG = " ".join(f"Mill number {i} stands by the river." for i in range(9))


def test_long_texts_become_passages_that_know_their_place(base_path, tmp_path):
    opened = ContextLibrary(tmp_path / "library", model=base_path, maximum_input_length=100)
    ids = opened.add(["short", LONG], ids=["short", "long"], titles=["", "Mills"])
    assert ids == ["short", *(f"long#{number}" for number in range(1, len(ids)))]
    passages = [opened.get(id) for id in ids[1:]]
    assert len(passages) > 3
    assert " ".join(LONG[passage.start : passage.end] for passage in passages) == LONG
    for passage in passages:
        assert (passage.document, passage.title, passage.truncated) == ("long", "Mills", False)
        assert passage.n_tokens <= 100
        states = passage.encoder_hidden_states.float()
        torch.testing.assert_close(states, states_of(base_path, passage.text), atol=1e-2, rtol=1e-2)
    assert (opened.get("short").document, opened.get("short").start, opened.get("short").end) == ("", 0, 5)
    assert opened.search("mill number 8")[0].id == ids[-1]
    for id in ("long", "long#1"):
        with pytest.raises(DsskError, match=f"has a context '{id}'"):
            opened.add(["again"], ids=[id])
    opened.remove("long")
    assert list(ContextLibrary(opened.path)) == ["short"]


def test_the_size_of_passages_their_overlap_and_their_titles_can_be_chosen(base_path, tmp_path):
    opened = ContextLibrary(tmp_path / "library", model=base_path)
    splitter = Splitter(90, overlap=45, repeat_title=True)
    ids = opened.add([LONG], ids=["long"], titles=["Mills"], splitter=splitter)
    passages = [opened.get(id) for id in ids]
    assert all(passage.text == f"Mills\n{LONG[passage.start : passage.end]}" for passage in passages)
    assert all(one.end > two.start for one, two in itertools.pairwise(passages))
    opened.add(["short"], ids=["whole"], titles=["Mills"], splitter=splitter)
    assert (opened.get("whole").text, opened.get("whole").document) == ("Mills\nshort", "")
    with pytest.raises(DsskError, match="want at most 256"):
        opened.add(["a"], splitter=Splitter(257))


def test_an_add_that_fails_half_way_leaves_what_was_there(filled, monkeypatch):
    before = (filled.path / "manifest.json").read_bytes()
    monkeypatch.setattr(library, "BLOCK_CONTEXTS", 1)
    monkeypatch.setattr(library, "SEGMENT_BYTES", 1)
    with pytest.raises(DsskError, match="has a context 'long#2'"):
        filled.add(["taken", LONG * 2], ids=["long#2", "long"])
    assert (filled.path / "manifest.json").read_bytes() == before
    assert [hit.id for hit in ContextLibrary(filled.path).search("aston")] == ["bridge"]
    filled.add(["one more"], ids=["more"])
    assert list(ContextLibrary(filled.path)) == ["mill", "bridge", "ann", "more"]
    assert {path.name for path in segments(filled)} == {Path(s.name).name for s in filled.manifest.segments}


def test_long_texts_are_cut_where_that_is_asked_for_and_say_so(base_path, tmp_path):
    opened = ContextLibrary(tmp_path / "library", model=base_path, maximum_input_length=20)
    opened.add(["short", "x" * 50], ids=["short", "long"], truncate=True)
    assert [(opened.get(id).n_tokens, opened.get(id).truncated) for id in opened] == [(14, False), (20, True)]
    assert opened.num_tokens("x" * 50) == 59
    with pytest.raises(DsskError, match="maximum_input_length is 257, more than the 256 positions"):
        ContextLibrary(tmp_path / "other", model=base_path, maximum_input_length=257)


def test_searching_several_indices_finds_what_one_of_all_texts_would():
    texts = [f"{'mill ' * (i % 3)}river number {i} {'old' if i % 5 else 'tower'}" for i in range(40)]
    texts += ["", "a"]
    whole = WordIndex.of_texts(texts)
    parts = [WordIndex.of_texts(texts[start : start + 7]) for start in range(0, len(texts), 7)]
    for question in ("old mill", "the tower number 25", "mill river 7", "zeppelin"):
        one, several = (dict(search(indices, question, 50)) for indices in ([whole], parts))
        assert one.keys() == several.keys()
        assert all(several[number] == pytest.approx(one[number], rel=0.35) for number in one)
        assert next(iter(search(parts, question, 1)), None) == next(iter(several.items()), None)
    assert search(parts, "25", 1)[0][0] == 25
    assert search([], "mill", 3) == search([WordIndex.of_texts(["", ""])], "mill", 3) == []


def test_an_index_that_names_texts_which_are_none_is_damage(tmp_path):
    WordIndex.of_texts(["an old mill", "a river"]).save(tmp_path)
    (path,) = tmp_path.glob("indices.csc.index.npy")
    numbers = np.load(path)
    for wrong in (2, -1):
        np.save(path, np.full_like(numbers, wrong))
        with pytest.raises(DamagedData, match=f"names text {wrong} of 2"):
            WordIndex.load(tmp_path).search("mill", 1)


def test_a_change_indexes_what_it_writes_and_nothing_else(filled, monkeypatch):
    monkeypatch.setattr(library, "SMALL_BYTES", 0)
    indexed = []
    made = WordIndex.of_texts
    monkeypatch.setattr(WordIndex, "of_texts", lambda texts: indexed.append(len(texts)) or made(texts))
    filled.add(["a tower", "a gate"], ids=["tower", "gate"])
    filled.remove("gate")
    assert indexed == [2, 1]
    assert [hit.id for hit in filled.search("tower bridge", 5)] == ["tower", "bridge"]


def test_opening_reads_no_ids_and_no_states(filled, monkeypatch):
    monkeypatch.setattr(SegmentFile, "column", lambda *args: pytest.fail("ids were read"))
    monkeypatch.setattr(SegmentFile, "states", lambda *args: pytest.fail("states were read"))
    assert len(ContextLibrary(filled.path)) == 3


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
    for row in load_rows(store_path)["val"]:
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
    (segment,) = segments(filled)
    content = segment.read_bytes()
    segment.write_bytes(content[:-1])
    with pytest.raises(DamagedData, match=segment.name):
        ContextLibrary(filled.path)
    segment.write_bytes(content)
    manifest = filled.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version":2', '"format_version":3').replace(": 2", ": 3"))
    with pytest.raises(DsskError, match="has format version 3, this dssk reads 2"):
        ContextLibrary(filled.path)
    for damaged in ("{}", "null", "[" * 100_000, "", text[:-2], text.replace("32", "33")):
        manifest.write_text(damaged)
        with pytest.raises(DsskError, match="manifest.json"):
            ContextLibrary(filled.path)


def test_every_flipped_byte_is_found_by_the_first_that_reads_it_and_never_joined(filled, tmp_path):
    """150 of 150 mutations of any file of a library: one line, exit code 4, and nothing is written."""
    rng = random.Random(0)
    paths = sorted(path for path in filled.path.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in paths}
    for _ in range(150):
        path = rng.choice(paths)
        changed = bytearray(whole[path])
        position = rng.randrange(len(changed))
        if rng.random() < 0.2:
            del changed[position : position + rng.randrange(1, 50)]
        else:
            changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        for use in (
            lambda: ContextLibrary(filled.path).search("mill"),
            lambda: ContextLibrary(filled.path).verify(),
        ):
            with pytest.raises(DsskError, match=r"^[^\n]*$"):
                use()
        if path.parent.name == "contexts":
            for write in (lambda: filled.add(["new"], ["new"]), lambda: filled.remove("ann")):
                with pytest.raises(DamagedData, match="was altered|bytes, not"):
                    write()
        path.write_bytes(whole[path])
    assert {path: path.read_bytes() for path in filled.path.rglob("*") if path.is_file()} == whole
    filled.verify()
    assert list(ContextLibrary(filled.path)) == ["mill", "bridge", "ann"]


def rewrite(path, **changes) -> None:
    """Change fields of a manifest, and its checksum with them."""
    manifest = load_manifest(path).model_copy(update=changes)
    (path / "manifest.json").write_text(manifest.to_json())


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 16},
        {"hidden_size": -1},
        {"hidden_size": 10**12},
        {"maximum_input_length": -5},
        {"storage_dtype": "fp16x"},
        {"storage_dtype": "fp32"},
        {"storage_dtype": "int8"},
    ],
)
def test_a_manifest_with_nonsense_is_refused(filled, changes):
    rewrite(filled.path, **changes)
    with pytest.raises(DamagedData):
        ContextLibrary(filled.path)


def test_what_a_manifest_describes_and_is_none_of_it_is_refused(filled):
    """Files that fit their checksums and nothing else."""
    (segment,) = filled.manifest.segments
    index = next(name for name in filled.manifest.files if name.endswith("indptr.csc.index.npy"))
    filled.search("mill")
    for name in (segment.name, index):
        path = filled.path / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        info = {"num_bytes": path.stat().st_size, "xxh3_128": files.xxh3_128(path)}
        if name == segment.name:
            rewrite(filled.path, segments=[segment.model_copy(update=info)])
        else:
            rewrite(filled.path, files=filled.manifest.files | {name: FileInfo(**info)})
        with pytest.raises(DamagedData, match="does not hold what it should"):
            ContextLibrary(filled.path).search("mill")
        path.write_bytes(content)
        (filled.path / "manifest.json").write_text(filled.manifest.to_json())


def test_a_whole_index_of_other_contexts_is_refused(base_path, filled, tmp_path):
    """As whole as its checksums say, and of fewer contexts."""
    other = ContextLibrary(tmp_path / "other", model=base_path)
    other.add(TEXTS[:2], ids=["mill", "bridge"])
    (ours,), (theirs,) = (opened.path.glob("search-*") for opened in (filled, other))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    reseal_store(filled.path)
    with pytest.raises(DamagedData, match="is not the index of these contexts"):
        ContextLibrary(filled.path).search("mill")


def test_names_in_a_manifest_never_lead_outside(filled, tmp_path):
    (segment,) = filled.manifest.segments
    victim = tmp_path / "other" / "contexts" / Path(segment.name).name
    victim.parent.mkdir(parents=True)
    shutil.copy(filled.path / segment.name, victim)
    for name in (f"../other/{segment.name}", str(victim), f"contexts/../../other/{segment.name}"):
        rewrite(filled.path, segments=[segment.model_copy(update={"name": name})])
        for use in (ContextLibrary, verify.check):
            with pytest.raises(DamagedData, match="is not the name of a file in it"):
                use(filled.path)
        with pytest.raises(DamagedData):
            filled.add(["new"])
        assert victim.exists()
    (filled.path / "out").symlink_to(tmp_path / "other")
    rewrite(filled.path, segments=[segment.model_copy(update={"name": f"out/{segment.name}"})])
    with pytest.raises(DamagedData, match="is not the name of a file in it"):
        ContextLibrary(filled.path)


def test_a_change_removes_nothing_but_what_a_killed_writer_left(filled):
    """Names of other people are left alone, also those that begin like ours."""
    others = [
        "contexts/notes.txt",
        "contexts/data-1.arrow",
        "contexts-mine.arrow",
        "search-engine/a",
        ".tmp-mine",
    ]
    ours = ["contexts/data-0123456789abcdef.arrow", "search-0123456789abcdef/params.json", ".tmp-01234567-x"]
    for name in others + ours:
        (filled.path / name).parent.mkdir(exist_ok=True)
        (filled.path / name).touch()
    filled.add(["new"], ids=["new"])
    assert all((filled.path / name).exists() for name in others)
    assert not any((filled.path / name).exists() for name in ours)


def test_verified_files_are_not_read_again(filled, monkeypatch, tmp_path):
    """Opening takes no longer for more states: the second time a segment is only looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dssk.utils.hashes._is_settled", lambda path: True)
    ContextLibrary(filled.path).search("mill")
    monkeypatch.setattr("dssk.utils.files.xxh3_128", lambda *args: pytest.fail("a file was read whole"))
    assert ContextLibrary(filled.path).search("mill")


def test_the_index_is_read_from_the_disk(filled, monkeypatch):
    expected = filled.search("mill bridge", 2)
    monkeypatch.setattr(WordIndex, "of_texts", lambda texts: pytest.fail("the index was made anew"))
    opened = ContextLibrary(filled.path)
    assert opened.search("mill bridge", 2) == expected
    assert isinstance(opened._indices[0]._index.scores["data"], np.memmap)


def test_a_reader_meets_an_index_that_another_process_replaced(filled):
    reader = ContextLibrary(filled.path)
    filled.add(["a zeppelin"], ids=["zeppelin"])
    assert [hit.id for hit in reader.search("zeppelin")] == ["zeppelin"]


def test_only_one_writes_at_a_time_and_nobody_else_s_work_is_lost(filled):
    other = ContextLibrary(filled.path)
    with files.only_writer(filled.path), pytest.raises(Locked, match="is held by"):
        other.add(["x"])
    other.add(["x"], ids=["x"])
    filled.add(["y"], ids=["y"])
    assert list(filled) == list(ContextLibrary(filled.path)) == ["mill", "bridge", "ann", "x", "y"]
    other.remove("x")
    with pytest.raises(DsskError, match="no context 'x'"):
        filled.remove("x")


def test_the_current_directory_can_be_a_library(filled, monkeypatch):
    monkeypatch.chdir(filled.path)
    ContextLibrary(".").add(["x"], ids=["x"])
    assert list(ContextLibrary(".")) == ["mill", "bridge", "ann", "x"]


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
    # A fork of this process, which has threads, could wait for a lock that one of them held.
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload(["tests.store.test_library"])
    for step in range(1, 40):
        copy = shutil.copytree(filled.path, filled.path.with_name(f"copy-{step}"))
        process = workers.Process(target=_write_until_killed, args=(copy, step))
        process.start()
        process.join()
        again = ContextLibrary(copy)
        seen.add(tuple(again))
        for id in again:
            assert again.get(id).encoder_hidden_states.isfinite().all()
        again.add(["after"], ids=["after"])
        assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == {
            "manifest.json",
            *again.manifest.all_files,
        }
        assert [hit.id for hit in again.search("after")] == ["after"]
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
