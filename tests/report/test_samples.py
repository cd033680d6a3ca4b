import numpy as np
import pytest
import torch

from dssk.inference.attending import attend
from dssk.inference.encoding import Encoder
from dssk.inference.loading import load_model
from dssk.report.samples import KEPT, SCALE, choose, dense, describe, is_right, with_attention
from tests.report.conftest import row


def rows(*right: bool) -> list[dict]:
    return [row(i, "a b", "q", ["b"], "the B." if r else "c") for i, r in enumerate(right)]


def test_half_of_the_samples_are_wrong_as_far_as_there_are_as_many():
    mixed = rows(*([True, True, False] * 20))
    chosen = choose(mixed, 12)
    assert [is_right(r) for r in chosen].count(False) == 6
    assert chosen == sorted(chosen, key=mixed.index)
    assert {mixed.index(r) // 20 for r in chosen} == {0, 1, 2}  # spread
    assert [is_right(r) for r in choose(rows(*[True] * 30, False), 10)].count(False) == 1
    assert [is_right(r) for r in choose(rows(*[False] * 30, True), 10)].count(False) == 9
    few = rows(True, False)
    assert choose(few, 24) == few
    assert choose(few, 0) == []


def test_a_row_is_described_with_its_other_answers():
    described = describe(rows(True)[0])
    assert (described["answer"], described["gold"], described["right"]) == ("the B.", ["b"], True)
    assert described["others"] == {"no_context": "guess 0"}


def test_weights_are_those_of_the_heads_and_their_mean(run_folder):
    model, tokenizer = load_model(run_folder)
    given = row(0, "It was built by Ann.", "who built it", ["Ann"], "Ann")
    (sample,) = with_attention(model, tokenizer, [given])
    states = Encoder(model, tokenizer).encode([given["context"]])[0]
    expected = attend(model, tokenizer, given["question"], "Ann", states).weights
    assert "".join(sample["tokens"]) == "context: " + given["context"]
    assert "".join(sample["tokens"][i] for i in sample["marked"]) == " Ann"
    found = torch.tensor(np.stack([[dense(sample, b, h) for h in range(3)] for b in range(2)])).float()
    torch.testing.assert_close(found[:, 1:], expected, atol=1 / SCALE, rtol=0)
    torch.testing.assert_close(found[:, 0], expected.mean(1), atol=1 / SCALE, rtol=0)


def test_a_context_is_shown_as_far_as_it_was_encoded_and_its_greatest_weights_kept(run_folder):
    model, tokenizer = load_model(run_folder)
    given = row(0, "Ann " * 100, "who", ["Ann"], "Ann") | {"context_tokens": 300}
    (sample,) = with_attention(model, tokenizer, [given])
    assert len(sample["tokens"]) == 300
    assert max(sample["marked"]) < 300
    lengths = {len(pairs) for block in sample["weights"] for head in block for pairs in head}
    assert lengths == {2 * KEPT}
    states = Encoder(model, tokenizer).encode([given["context"]])[0][:300]
    weights = attend(model, tokenizer, "who", "Ann", states).weights
    assert sample["weights"][1][2][0][0] == weights[1, 1, 0].argmax()
    assert sample["weights"][1][2][0][1] == pytest.approx(SCALE * weights[1, 1, 0].max(), abs=1)
