"""Answering with a merged reader: the same road as with blocks."""

import pytest
import torch

import dssk
from dssk.errors import DsskError
from dssk.inference.attending import attend
from dssk.inference.encoding import Encoder
from dssk.inference.generation import contexts_together, generate_batch, nll_batch, positions_left
from dssk.inference.tokenizer import tokenize_question
from tests.conftest import VOCAB_SIZE, byte_tokenizer, fused
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


def test_a_context_and_its_text_share_the_positions(base_path, tokenizer):
    """On learned positions, of which there are 256: one more would be no error of ours."""
    model = fused(base_path, reader="merged", encode_layer=2)
    text, question = "a mill by the river " * 50, "who built it"
    assert isinstance(model.answer(question, text, tokenizer, max_new_tokens=6), str)  # in passages
    asked = tokenize_question(tokenizer, question, "merged")
    prompt = len(asked)
    (states,) = Encoder(model, tokenizer, maximum_input_length=256 - prompt - 2).encode([text])
    context = contexts_together(model, [[states]])
    assert positions_left(model, context["context"], [prompt]) == 2
    generate_batch(model, tokenizer, [asked], 6, **context)  # no more than there are positions for
    (states,) = Encoder(model, tokenizer, maximum_input_length=250).encode([text])
    with pytest.raises(
        DsskError, match=rf"a context of 250 tokens and {prompt + 1} of .* the model's 256 positions"
    ):
        model.answer(question, states, tokenizer)
    with pytest.raises(DsskError, match="a context of 250 tokens"):
        nll_batch(model, tokenizer, [[5] * 5], [[6] * 2], **contexts_together(model, [[states]]))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_attention_behind_a_sliding_window_is_on_the_end_of_the_context(family, tokenizer, tmp_path):
    """gemma2 mixes layers of both kinds."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "sliding_window": 8}
    model = dssk.from_base(tiny_base(family, tmp_path, **sizes), reader="merged", encode_layer=2).eval()
    with torch.no_grad():
        model.cross_attn_blocks[0].up.weight.normal_(std=0.3)
    (states,) = Encoder(model, tokenizer).encode(["a mill by the river and a tower of stone"])
    found = attend(model, tokenizer, "who", "it", states)
    assert found.weights.shape[-1] == len(states) > 40
    sums = found.weights.sum(-1)
    assert ((sums - 1).abs().lt(1e-4) | sums.eq(0)).all()  # a question can be longer than the window
    slides = found.weights[0]  # the first layer of both does
    assert slides[..., : len(states) - 8].sum() == 0
