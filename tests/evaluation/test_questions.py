import json

import pytest
import torch

from dssk.errors import DsskError
from dssk.evaluation.questions import (
    check_encodings,
    load_questions,
    other_questions,
    other_rows,
    sample,
    spread,
)
from dssk.inference.tokenizer import load_tokenizer
from dssk.store.dataset import load_rows
from tests.conftest import fused, make_base, question_rows


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


def test_a_wrong_context_is_never_the_right_one():
    contexts = ["a", "a", "b", "c", "c", "c"]
    wrong = other_rows(contexts)
    assert all(contexts[j] != contexts[i] for i, j in enumerate(wrong))
    with pytest.raises(DsskError, match="share one context"):
        other_rows(["a", "a"])


def test_another_question_is_one_of_the_same_context_with_other_words():
    contexts = ["a", "b", "a", "a", "c", "c"]
    assert other_questions(contexts, ["x", "x", "x", "y", "z", "z"]) == [3, None, 3, 0, None, None]


def test_a_sample_is_spread_over_the_rows_and_always_the_same(store_path):
    rows = load_rows(store_path)["val"]
    assert len(sample(rows, None)) == len(sample(rows, 10**6)) == len(rows)
    picked = sample(rows, 4)["id"]
    assert list(picked) == [
        rows["id"][i] for i in (0, round((len(rows) - 1) / 3), round((len(rows) - 1) * 2 / 3), -1)
    ]
    assert spread(5, 2) == [0, 4]


def test_raw_questions_have_the_states_that_their_store_holds(base_path, tokenizer, store_path, tmp_path):
    model = fused(base_path)
    stored = load_questions(str(store_path), tokenizer, model.config)
    file = tmp_path / "rows.jsonl"
    rows = [row for row in question_rows(48) if row["id"] in {r.id for r in stored.rows}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = load_questions(str(file), tokenizer, model.config)
    order = [stored.rows.index(row) for row in raw.rows]
    assert sorted(order) == list(range(len(stored)))
    assert raw.context_tokens == [stored.context_tokens[i] for i in order]
    assert raw.bytes_per_context_token == stored.bytes_per_context_token == 64
    for ours, theirs in zip(raw.states(model, range(len(raw))), stored.states(model, order), strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs)


def test_states_of_two_layers_are_counted_twice(base_path, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in question_rows(2)))
    model = fused(base_path, reader="merged", encode_layer="1+3")
    questions = load_questions(str(file), tokenizer, model.config)
    states = questions.states(model, [0])[0]
    assert states.nbytes == questions.bytes_per_context_token * questions.context_tokens[0]


def test_contexts_are_cut_to_the_models_positions(base_path, tokenizer, tmp_path):
    model = fused(base_path)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"context": "x" * 1000, "question": "q", "answer": "a"}))
    questions = load_questions(str(file), tokenizer, model.config)
    assert questions.context_tokens == [256]
    assert questions.states(model, [0])[0].shape == (256, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"context": "c"}\n', "rows.jsonl:1: no answer"), ("", "no usable row")],
)
def test_rows_that_cannot_be_used_are_named(base_path, tokenizer, tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DsskError, match=message):
        load_questions(str(file), tokenizer, fused(base_path).config)


def test_a_split_that_is_not_there_is_refused(base_path, tokenizer, store_path):
    with pytest.raises(DsskError, match="no split test, it has train, val"):
        load_questions(str(store_path), tokenizer, fused(base_path).config, "test")


def test_encodings_of_another_base_are_refused(base_path, store_path, tmp_path):
    model = fused(base_path)
    model.save_pretrained(tmp_path / "fused")
    load_tokenizer(base_path).save_pretrained(tmp_path / "fused")
    check_encodings(str(store_path), tmp_path / "fused")
    other = fused(make_base(tmp_path / "base", seed=1))
    other.save_pretrained(tmp_path / "other", cross_attn_only=True)
    with pytest.raises(DsskError, match="other weights"):
        check_encodings(str(store_path), tmp_path / "other")
