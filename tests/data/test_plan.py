"""What is kept, divided, numbered and cut before anything is encoded."""

import itertools

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dssk import prompts
from dssk.data.plan import Tally
from dssk.data.readers import BadRow
from dssk.errors import DsskError
from dssk.inference.tokenizer import load_tokenizer, tokenize_contexts
from dssk.store.dataset import load_rows
from dssk.store.manifest import load_shard_info
from dssk.store.opening import load_manifest
from tests.data.conftest import rows, write_jsonl


@pytest.fixture
def texts(tmp_path, preprocess):
    """Preprocess rows without encoding them; returns the manifest and the rows of both splits."""
    numbers = itertools.count()

    def run(values, **flags):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        path = preprocess(folder, write_jsonl(folder / "r.jsonl", values), text_only=True, **flags)
        loaded = load_rows(path)
        return load_manifest(path), loaded["train"].to_list(), loaded["val"].to_list()

    return run


def row(context, question="q", answer="a", **more):
    return {"context": context, "question": question, "answer": answer, **more}


def test_rows_keep_their_fields_and_their_order(texts):
    values = rows(20)
    manifest, train, val = texts(values)
    assert sorted(r["id"] for r in train + val) == sorted(r["id"] for r in values)
    by_id = {r["id"]: r for r in values}
    for found in (train, val):
        ids = [r["id"] for r in found]
        assert ids == [r["id"] for r in values if r["id"] in ids]
        for r in found:
            assert r == by_id[r["id"]] | {"answers": [r["answer"]]}
    assert manifest.counts.rows == {"train": len(train), "val": len(val)}


def test_a_context_is_never_in_both_splits(texts):
    _, train, val = texts(rows(30), val_fraction=0.3)
    assert not {r["context"] for r in train} & {r["context"] for r in val}
    assert 0.3 <= len(val) / 60 <= 0.35


def test_a_document_is_never_divided(texts):
    values = [row(f"c{i}", title=f"d{i % 6}") for i in range(60)]
    _, train, val = texts(values, val_fraction=0.2)
    documents = {r["context"]: values[i]["title"] for i, r in enumerate(values)}
    assert not {documents[r["context"]] for r in train} & {documents[r["context"]] for r in val}
    assert len(val) == 20


def test_the_order_of_rows_does_not_change_the_split(texts):
    values = rows(30)
    _, _, val = texts(values)
    _, _, reversed_val = texts(values[::-1])
    assert {r["id"] for r in val} == {r["id"] for r in reversed_val}


def test_contexts_of_a_val_data_set_are_taken_out_of_train(texts, tmp_path):
    val_path = write_jsonl(tmp_path / "val.jsonl", rows(5))
    manifest, train, val = texts(rows(8), val_dataset=val_path)
    assert len(val) == 10
    assert {r["context"] for r in train} == {r["context"] for r in rows(3, start=5)}
    assert manifest.counts.dropped == {"context also in val": 10}


def test_duplicates_are_dropped_and_counted(texts):
    values = rows(10) + [r | {"id": "again"} for r in rows(3)] + [row(" ")]
    manifest, train, val = texts(values)
    assert manifest.counts.dropped == {"duplicate": 6, "empty context": 1}
    assert manifest.counts.read == 27
    assert len(train) + len(val) == 20
    assert manifest.counts.contexts == 10


def test_at_most_max_examples_usable_rows_are_read(texts):
    manifest, train, val = texts([row(" "), *rows(30)], max_examples=11)
    assert manifest.counts.read == 12
    assert len(train) + len(val) == 11


def test_long_contexts_are_cut_and_counted(texts):
    manifest, _, _ = texts(
        [row("x" * n) for n in (1, 50, 51, 80)],
        maximum_input_length=len("context: ") + 50,
        truncate=True,
    )
    assert (manifest.counts.truncated, manifest.counts.lost_tokens) == (2, 31)
    assert manifest.counts.tokens == 4 * len("context: ") + 1 + 50 + 50 + 50
    assert manifest.counts.length_histogram == [1, 0, 0, 3]


def test_a_context_is_tokenized_as_the_template_and_nothing_else(base_path):
    tokenizer = load_tokenizer(base_path)
    text = "Ash Spring has 5 mills. \n\n  é"
    ids = tokenize_contexts(tokenizer, [text])
    assert ids == [tokenizer(prompts.context(text), add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(ids[0]) == prompts.context(text)


def test_shards_hold_each_context_once_longest_first(finished):
    contexts = datasets.load_from_disk(str(finished / "contexts"))
    assert len(contexts) == len(set(contexts["context"])) == 40
    lengths = contexts["n_tokens"]
    infos = [load_shard_info(path) for path in sorted(finished.glob("contexts/data-*.json"))]
    assert [shard.rows for shard in infos] == [8] * 5
    for shard in infos:
        part = lengths[shard.first_row : shard.first_row + shard.rows]
        assert part == sorted(part, reverse=True)
        assert sum(part) == shard.tokens


def test_a_split_without_rows_is_named(texts):
    with pytest.raises(
        DsskError, match=r"0 usable rows in train, of 3 rows read \(empty question: 3\): give rows"
    ):
        texts([row("c", question=""), row("d", question=""), row("e", question="")])


def test_rows_about_one_document_are_not_divided_and_the_way_out_is_named(texts):
    values = [row(f"c{i}", title="T") for i in range(3)]
    with pytest.raises(
        DsskError, match="all 3 are about one document, which is never divided: pass --val_fraction 0"
    ):
        texts(values)
    manifest, train, val = texts(values, val_fraction=0)
    assert (len(train), val) == (3, [])
    assert manifest.counts.rows == {"train": 3, "val": 0}


def test_malformed_rows_stop_the_work_unless_they_are_allowed(texts):
    values = [*rows(10), {"context": "c"}, row("d", question=5)]
    with pytest.raises(
        DsskError, match=r"2 of 22 rows .*r.jsonl:21: no answer; r.jsonl:22: question is int.*rows 2"
    ):
        texts(values)
    manifest, _, _ = texts(values, skip_bad_rows=2)
    assert manifest.counts.bad_rows == ["r.jsonl:21: no answer", "r.jsonl:22: question is int, want text"]


def test_rows_of_unknown_fields_are_told_once_with_what_is_wanted(texts):
    values = [{"passage": f"p{i}", "q": "q", "answer": "a"} for i in range(8)]
    with pytest.raises(DsskError) as caught:
        texts(values)
    said = str(caught.value)
    assert said.count("no known schema has just the fields answer, passage, q") == 1
    assert "r.jsonl:1, r.jsonl:2, r.jsonl:3, r.jsonl:4, r.jsonl:5: no known" in said
    assert (
        "want context, question and answer, or name them as in --columns context=passage,answer=answers"
        in said
    )
    _, train, val = texts(values, columns="context=passage,question=q")
    assert {r["context"] for r in train + val} == {f"p{i}" for i in range(8)}


def test_a_file_of_nothing_but_bad_rows_is_not_kept_in_memory():
    tally = Tally(max_bad_rows=2)
    for i in range(1000):
        tally.add_bad_row(f"f:{i}", BadRow("no answer"))
    assert len(tally.bad_rows) == 5
    with pytest.raises(DsskError, match="1000 of 0 rows of f .* pass --skip_bad_rows 1000"):
        tally.check("f")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30))
def test_whatever_repeats_every_kept_row_finds_its_own_context(texts, pairs):
    values = [row(f"context {c}" + "." * c, f"q{q}", id=f"{c} {q}") for c, q in pairs]
    values += rows(2)  # so that both splits have one
    try:
        manifest, train, val = texts(values, shard_rows=3)
    except DsskError:
        return
    distinct = {(r["context"], r["question"]) for r in values}
    assert {(r["context"], r["question"]) for r in train + val} == distinct
    assert manifest.counts.contexts == len({context for context, _ in distinct})
