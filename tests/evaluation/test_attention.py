import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from dssk import prompts
from dssk.evaluation import attention
from dssk.evaluation.attention import answer_mask, best_head, evidence, find_words
from dssk.inference.attending import Attention, attend, context_texts, seen
from dssk.inference.encoding import Encoder
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from tests.conftest import byte_tokenizer, fused

QUESTION, CONTEXT, ANSWER = "who built the mill", "Mill was built in 1785 by Ann .", "Ann"


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(
    scope="module", params=[{}, {"cross_attn_final_layer": True, "cross_attn_shared_weights": True}]
)
def model(base_path, request):
    return fused(base_path, **request.param)


def test_weights_are_those_at_the_positions_that_predict_the_answer(model, tokenizer):
    (states,) = Encoder(model, tokenizer).encode([CONTEXT])
    inputs = []
    blocks = model.transformer.cross_attn
    hooks = [
        b.attn.register_forward_pre_hook(lambda module, args: inputs.append((module, args))) for b in blocks
    ]
    found = attend(model, tokenizer, QUESTION, ANSWER, states)
    for hook in hooks:
        hook.remove()
    prompt = len(tokenizer(prompts.question(QUESTION))["input_ids"])
    expected = []
    read = [(module, args) for module, args in inputs if len(args) > 1]  # not those that project the context
    for module, (hidden_states, keys, *_) in read:
        heads, size = module.num_heads, module.head_dim
        queries = module.q_attn(hidden_states)[0].view(-1, heads, size)
        scores = torch.einsum("thd,hsd->hts", queries, keys[0]) / size**0.5
        expected.append(scores.softmax(-1)[:, prompt - 1 : prompt - 1 + len(" Ann")])
    assert found.weights.shape == (2, 4, 4, len(states))
    torch.testing.assert_close(found.weights, torch.stack(expected))
    assert found.layers == [1, 3]
    assert "".join(found.answer_tokens) == " Ann"


def test_the_model_is_left_as_it_was(model, tokenizer, monkeypatch):
    (states,) = Encoder(model, tokenizer).encode([CONTEXT])
    model.train()
    attend(model, tokenizer, QUESTION, ANSWER, states)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TypeError):
        attend(model, tokenizer, QUESTION, ANSWER, states)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()


def test_most_attended_is_over_the_whole_answer():
    weights = torch.tensor([[[[0.6, 0.4, 0.0], [0.0, 0.4, 0.6]]]])
    assert Attention(weights, [0], ["a", "b"]).most_attended().tolist() == [[1]]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_the_pieces_of_a_context_join_to_its_text(text):
    tokenizer = byte_tokenizer()
    pieces = context_texts(tokenizer, text)
    assert "".join(pieces) == prompts.context(text)
    assert len(pieces) == len(tokenize_context(tokenizer, text))


def test_tokens_that_stand_before_every_text_have_empty_pieces_and_are_no_answer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    pieces, marked = context_texts(tokenizer, CONTEXT), answer_mask(tokenizer, CONTEXT, ["Ann"])
    assert len(pieces) == len(marked) == len(tokenize_context(tokenizer, CONTEXT))
    assert pieces[0] == ""
    assert "".join(piece for piece, inside in zip(pieces, marked, strict=True) if inside) == " Ann"


def test_the_answers_tokens_are_found_where_it_stands_as_words(tokenizer):
    context = "1785 or 11785: in 1785 ANN met Anna."
    text = prompts.context(context)
    marked = answer_mask(tokenizer, context, ["1785", "Ann"]).nonzero().flatten().tolist()
    first, year, name = text.index("1785"), text.index(" 1785 ANN"), text.index(" ANN")
    spaces = [first - 1]  # a token of its own, as the decoder's answer " 1785" begins with one
    assert marked == sorted(
        {*spaces, *range(first, first + 4), *range(year, year + 5), *range(name, name + 4)}
    )
    assert find_words("a.b axb", "a.b") == [(0, 3)]
    assert find_words("text", " ") == []


def test_one_head_is_chosen_on_some_questions_and_measured_on_others():
    hits = np.zeros((40, 2, 3), bool)
    hits[:, 0, 1] = np.arange(40) % 4 != 0  # best where it is measured, useless where it is chosen
    hits[:, 1, 2] = np.arange(40) % 2 == 0  # always right where it is chosen
    found = attention._measure(
        [4, 7], hits, hits, hits.astype(float), np.full(40, 0.1), list(map(str, range(40)))
    )
    assert (found.layer, found.block, found.head) == (7, 1, 2)
    assert (found.chosen_on, found.n) == (10, 30)
    assert found.share == pytest.approx(1 / 3, abs=1e-4)
    assert found.low < found.share < found.high
    assert best_head(hits) == (0, 1)
    one_context = attention._measure([4, 7], hits, hits, hits.astype(float), np.full(40, 0.1), ["a"] * 40)
    assert one_context.low == one_context.high == found.share


def test_evidence_finds_the_head_that_looks_at_the_answer(base_path, tokenizer, monkeypatch):
    """Head 2 of block 1 is built to attend to what the first value of a state marks."""
    model = fused(base_path)
    attn = model.transformer.cross_attn[0].attn  # of the highest layer
    with torch.no_grad():
        for weight in (attn.q_attn.weight, attn.k_attn.weight, attn.k_attn.bias):
            weight.zero_()
        attn.q_attn.bias.fill_(8.0)
        attn.k_attn.weight[2 * attn.head_dim : 3 * attn.head_dim, 0] = 8.0

    def marked_states(encoder, texts):
        mask = answer_mask(tokenizer, texts[0], ["Ann"])
        states = torch.randn(len(mask), 32)
        states[:, 0] = mask.float()
        return [states]

    monkeypatch.setattr(Encoder, "encode", marked_states)
    row = {
        "question": QUESTION,
        "context": CONTEXT,
        "answers": ["Ann"],
        "with_context": {"prediction": "ann"},
    }
    others = [
        {"with_context": {"prediction": "Bob"}},  # wrong
        {"answer_class": "unanswerable"},
        {"context": "Nobody built it .", "answers": ["Ann"]},  # right, but not from the context
        {"context_tokens": 12},  # cut before the answer
    ]
    found = evidence(model, tokenizer, [row | other for other in [{}, *others] for _ in range(8)])
    assert found is not None
    assert (found.layer, found.block, found.head, found.chosen_on, found.n) == (3, 1, 2, 2, 6)
    assert found.share == found.share_first_token == found.high == 1
    assert found.share_mass > 0.99
    assert 0 < found.chance < 0.2
    assert evidence(model, tokenizer, [row | others[0]]) is None


def test_several_contexts_share_the_attention_and_each_has_its_span(model, tokenizer):
    texts = [CONTEXT, "Bread and cheese ."]
    states = Encoder(model, tokenizer).encode(texts)
    parts = seen(model, tokenizer, QUESTION, ANSWER, list(zip(texts, states, strict=True)))
    assert sum(part.share for part in parts) == pytest.approx(1, abs=1e-3)
    swapped = seen(model, tokenizer, QUESTION, ANSWER, [(texts[i], states[i]) for i in (1, 0)])
    assert [part.share for part in swapped] == pytest.approx([part.share for part in parts[::-1]], abs=1e-3)
    weights = attend(model, tokenizer, QUESTION, ANSWER, states).of_answer().mean((0, 1))
    own = weights[: len(states[0])]
    before = len(prompts.context(""))
    best = before + int(own[before:].argmax())  # one token a byte
    assert parts[0].start <= best - before <= parts[0].end
    assert seen(model, tokenizer, QUESTION, " ", [(CONTEXT, states[0])]) == []
