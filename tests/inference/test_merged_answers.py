"""Answering with a merged reader: the same road as with blocks."""

import pytest
import torch

import dssk
from dssk.inference.attending import attend
from dssk.inference.encoding import Encoder
from dssk.inference.generation import contexts_together
from tests.conftest import VOCAB_SIZE, byte_tokenizer
from tests.families import tiny_base

TEXTS = ["a mill by the river", "a tower of stone", "an old bridge"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_base(
        "llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCAB_SIZE, max_position_embeddings=256
    )
    torch.manual_seed(1)
    model = dssk.from_base(folder, reader="merged", encode_layer=2).eval()
    with torch.no_grad():
        model.cross_attn_blocks[0].up.weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<fim_pad>"
    return tokenizer


def test_texts_states_and_projected_contexts_answer_alike(model, tokenizer):
    questions = ["who built it", "when", "where is it"]
    expected = model.answer(questions, TEXTS[0], tokenizer, max_new_tokens=6)
    assert len(set(expected)) > 1
    (states,) = Encoder(model, tokenizer).encode(TEXTS[:1])
    assert model.answer(questions, states, tokenizer, max_new_tokens=6) == expected
    projected = model.project_context(states[None])
    assert model.answer(questions, projected, tokenizer, max_new_tokens=6) == expected
    assert model.answer(questions[0], TEXTS[0], tokenizer, max_new_tokens=6) == expected[0]


def test_several_contexts_have_no_order(model, tokenizer):
    states = Encoder(model, tokenizer).encode(TEXTS)
    ids = torch.tensor([tokenizer("question: who \n answer:")["input_ids"]])
    logits = [
        model(ids, **contexts_together(model, [[states[i] for i in order]])).logits
        for order in ((0, 1, 2), (2, 0, 1))
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    alone = model(ids, **contexts_together(model, [[states[0]]])).logits
    assert (alone - logits[0]).abs().max() > 1e-3
    several = model.answer(["who", "when"], [TEXTS, TEXTS[:1]], tokenizer, max_new_tokens=6)
    assert several[1] == model.answer("when", TEXTS[0], tokenizer, max_new_tokens=6)


def test_attention_is_the_share_of_each_token_of_the_context(model, tokenizer):
    (states,) = Encoder(model, tokenizer).encode(TEXTS[:1])
    found = attend(model, tokenizer, "who", "the river", states)
    assert found.layers == [0, 1, 2]
    assert found.weights.shape == (3, 4, len(found.answer_tokens), len(states))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(found.weights.shape[:-1]))
