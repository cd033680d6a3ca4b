import pytest
import torch

from dssk.errors import Diverged, EnvironmentFault
from dssk.inference import encoding
from dssk.inference.encoding import Batch, Encoder, encode
from dssk.inference.rounding import TORCH_DTYPES, rounded
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from tests.conftest import fused

TEXTS = ["Ann built a mill.", "x" * 300, "b", "Ann built a mill."]


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


def states_alone(base, tokenizer, text, longest=256):
    ids = torch.tensor([tokenize_context(tokenizer, text)[:longest]])
    return base.transformer(ids).last_hidden_state[0].detach()


def test_texts_encode_in_their_order_each_as_if_alone(base, tokenizer):
    found = Encoder(base, tokenizer, "fp32").encode(TEXTS, batch_size=3)
    for text, states in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(states, states_alone(base, tokenizer, text), atol=1e-5, rtol=1e-4)


def test_a_fused_model_encodes_as_its_base(base, base_path, tokenizer):
    ours = Encoder(fused(base_path), tokenizer).encode(TEXTS)
    for mine, its in zip(ours, Encoder(base, tokenizer).encode(TEXTS), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("storage_dtype", TORCH_DTYPES)
def test_states_are_rounded_as_a_store_keeps_them(base, tokenizer, storage_dtype):
    (states,) = Encoder(base, tokenizer, storage_dtype).encode(TEXTS[:1])
    assert torch.equal(states, rounded(states_alone(base, tokenizer, TEXTS[0]), storage_dtype))


def test_texts_are_cut_to_what_was_asked_or_to_the_window(base, tokenizer):
    assert Encoder(base, tokenizer).encode([TEXTS[1]])[0].shape == (256, 32)
    assert Encoder(base, tokenizer, maximum_input_length=20).encode([TEXTS[1]])[0].shape == (20, 32)


def test_nothing_encodes_to_nothing(base, tokenizer):
    assert Encoder(base, tokenizer).encode([]) == []


def test_a_batch_that_memory_does_not_hold_is_halved(base, tokenizer, monkeypatch):
    sizes = []

    def small(model, input_ids, mask, *layers):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("too much")
        return encode(model, input_ids, mask, *layers)

    whole = Encoder(base, tokenizer).encode(TEXTS)
    monkeypatch.setattr(encoding, "encode", small)
    encoder = Encoder(base, tokenizer)
    for ours, theirs in zip(encoder.encode(TEXTS), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert encoder.out_of_memory_splits == 3


def test_a_context_that_memory_does_not_hold_alone_is_named(base, tokenizer, monkeypatch):
    def never(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(encoding, "encode", never)
    with pytest.raises(EnvironmentFault, match=r"context 7 \('b'\) alone, 1 tokens"):
        Encoder(base).quantized(Batch(["b"], [[5]], 7))


def test_other_faults_stay_what_they_are(base, tokenizer, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(encoding, "encode", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        Encoder(base, tokenizer).encode(TEXTS)


def test_a_context_that_is_not_finite_is_named(base, tokenizer, monkeypatch):
    def infinite(model, input_ids, *rest):
        return torch.full((*input_ids.shape, 32), 1e6)

    monkeypatch.setattr(encoding, "encode", infinite)
    with pytest.raises(
        Diverged, match="context \\('Ann built a mill.'\\) encodes to NaN or infinity as fp16"
    ):
        Encoder(base, tokenizer, "fp16").encode(TEXTS[:1])


def test_the_second_context_of_a_batch_is_the_one_named(base, tokenizer, monkeypatch):
    def second_bad(model, input_ids, *rest):
        states = torch.zeros((*input_ids.shape, 32))
        states[1, 0] = torch.inf
        return states

    monkeypatch.setattr(encoding, "encode", second_bad)
    with pytest.raises(Diverged, match=r"context 11 \('b'\)"):
        Encoder(base).quantized(Batch(["a", "b"], [[5, 6], [7]], 10))
