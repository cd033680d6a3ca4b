"""Adapters of the decoder: they act while a context is read, in both readers, and at no other time."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import dssk
from dssk.models.weights import is_cross_attn
from tests.families import VOCAB_SIZE, tiny_base

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
READERS = {
    "merged": {"reader": "merged", "encode_layer": 2},
    "cross_attention": {"num_cross_attn_layers": 2, "cross_attn_init": "normal"},
}
# Grouped heads, Conv1D, one projection of queries, keys and values, sliding windows, latents and experts.
FAMILIES = "llama gpt2 gpt_bigcode gpt_neox gemma2 phi3 deepseek_v3".split()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=READERS)
def model(request, folder):
    return fused(folder, request.param)


def fused(folder, reader: str, trained: bool = True, **fields):
    torch.manual_seed(1)
    fields = {**READERS[reader], "decoder_lora": {"rank": 4}} | fields
    model = dssk.from_base(folder, **fields).eval()
    with torch.no_grad():
        if reader == "merged":  # maps that carry something, in place of fitted ones
            model.cross_attn_blocks[0].up.weight.normal_(std=0.3)
        if trained:
            for adapter in (model.decoder_adapters or {}).values():
                adapter.up.normal_(std=0.3)
    return model


def ids(*shape, seed: int = 0):
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def projected(model):
    return model.project_context(*model.encode(ids(2, 5, seed=1)))


def without_adapters(model, call):
    """What `call` returns when the adapters add nothing."""
    kept, model.base_model.decoder_lora = model.base_model.decoder_lora, None
    try:
        return call()
    finally:
        model.base_model.decoder_lora = kept


def test_without_a_context_it_is_the_base_bit_for_bit(model, base):
    assert torch.equal(model(ids(2, 7)).logits, base(ids(2, 7)).logits)
    assert torch.equal(model.generate(ids(2, 7), **GREEDY), base.generate(ids(2, 7), **GREEDY))
    model(ids(2, 7), context=projected(model))  # nothing of a call is left over
    assert torch.equal(model(ids(2, 7)).logits, base(ids(2, 7)).logits)


def test_encodings_and_projected_contexts_are_the_frozen_bases(model, base):
    states, _ = model.encode(ids(2, 5, seed=1))
    layer = model.config.encode_layers[0]
    hidden = base(ids(2, 5, seed=1), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, hidden[layer])
    plain = without_adapters(model, lambda: projected(model))
    assert all(map(torch.equal, plain.keys + plain.values, projected(model).keys + projected(model).values))
    # Also when the context's tokens are given in the call that reads them.
    torch.testing.assert_close(
        model(ids(2, 7), context_input_ids=ids(2, 5, seed=1)).logits,
        model(ids(2, 7), context=projected(model)).logits,
    )


def test_before_training_adapters_add_nothing(folder, model):
    fresh = fused(folder, model.config.reader, trained=False)
    call = lambda: fresh(ids(2, 7), context=projected(fresh)).logits  # noqa: E731
    assert torch.equal(call(), without_adapters(fresh, call))


def test_they_act_in_every_step_of_a_generation(model):
    context, question = projected(model), ids(2, 7)
    call = lambda: model(question, context=context).logits  # noqa: E731
    assert (call() - without_adapters(model, call)).abs().max() > 1e-3
    steps = question
    for _ in range(4):
        steps = torch.cat([steps, model(steps, context=context).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(question, context=context, **GREEDY), steps)
    # Decoding on by hand from the cache of a call that read.
    output = model(question, context=context, use_cache=True)
    given = {} if model.config.reader == "merged" else {"context": context}
    if model.config.reader == "merged":
        given["position_ids"] = torch.full((2, 1), 5 + 7)
    more = model(steps[:, 7:8], past_key_values=output.past_key_values, **given).logits[:, -1]
    torch.testing.assert_close(more, model(steps[:, :8], context=context).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_beams_read_as_whole_sequences_do(model):
    context = projected(model)
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    found = model.generate(
        ids(2, 7), context=context, **settings, output_scores=True, return_dict_in_generate=True
    )
    best = found.sequences[::2]
    logits = model(best, context=context).logits[:, 6:-1].log_softmax(-1)
    likelihood = logits.gather(-1, best[:, 7:, None])[..., 0].sum(-1)
    torch.testing.assert_close(found.sequences_scores[::2] * 4, likelihood, atol=1e-3, rtol=1e-3)


def test_every_linear_layer_learns_and_nothing_of_the_base(model):
    model = copy.deepcopy(model).train()
    states, mask = model.encode(ids(2, 5, seed=1))
    question = ids(2, 7)
    model(
        question, labels=question, encoder_hidden_states=states, encoder_attention_mask=mask
    ).loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    lora = {name for name, _ in model.named_parameters() if "decoder_lora." in name}
    assert lora <= graded
    assert all(map(is_cross_attn, graded))
    layers = model.base_model.decoder_layers()
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    inside = [m for block in model.cross_attn_blocks for m in block.modules()]
    assert len(lora) == 2 * len([m for m in linear if all(m is not other for other in inside)])
    trained = sum(p.numel() for name, p in model.named_parameters() if is_cross_attn(name))
    assert model.trainable_parameters()[0] == trained


def test_adapters_act_in_the_layers_that_are_run_again_on_a_context(tmp_path):
    path = tiny_base("llama", tmp_path)
    how = {"reader": "merged", "encode_layer": 1, "reader_replay": 2, "decoder_lora": {"rank": 4}}
    model = dssk.from_base(path, **how)
    states, mask = model.encode(ids(2, 5, seed=1))
    with torch.no_grad():
        before = model.project_context(states, mask)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.3)
    after = model.project_context(states, mask)
    assert [torch.equal(a, b) for a, b in zip(before.keys, after.keys, strict=True)] == [True, False, False]
    assert torch.equal(model.encode(ids(2, 5, seed=1))[0], states)
    after.values[2].sum().backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("decoder_lora.1_mlp" in name for name in graded)
    assert not any("decoder_lora.0_" in name for name in graded)


def test_what_is_saved_loads_and_the_base_keeps_its_names(model, base, tmp_path):
    expected = model(ids(2, 7), context=projected(model)).logits
    assert set(model.base_state_dict()) == set(base.state_dict())
    assert torch.equal(model.plain_base().eval()(ids(2, 7)).logits, base(ids(2, 7)).logits)
    for folder, options in ((tmp_path / "whole", {}), (tmp_path / "reader", {"cross_attn_only": True})):
        model.save_pretrained(folder, **options)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loaded.config.decoder_lora == {"rank": 4, "alpha": 8}
        assert torch.equal(loaded(ids(2, 7), context=projected(loaded)).logits, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(ids(2, 7), context=projected(other)).logits, expected)


@pytest.mark.parametrize(
    "lora", [{}, {"rank": 0}, {"rank": 4, "alpha": 0}, {"rank": 4, "targets": ["q_proj"]}]
)
def test_nonsense_is_refused(tmp_path, lora):
    with pytest.raises(ValueError, match="want a rank of at least 1, and at will an alpha above 0"):
        dssk.from_base(tiny_base("llama", tmp_path), decoder_lora=lora)
