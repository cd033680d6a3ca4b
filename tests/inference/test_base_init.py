"""Blocks that start as the self-attention of their layers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dssk
from dssk.inference.base_init import GATE, base_init_, check_base_init
from dssk.models.layers import find_layers
from tests.families import VOCAB_SIZE, tiny_base

LAYOUT = {
    "encode_layer": 2,
    "num_cross_attn_layers": 2,
    "cross_attn_num_key_value_heads": "base",
    "cross_attn_init": "base",
}
# Grouped heads; biases; a norm that keeps its weight less one; scores that are scaled otherwise.
FAMILIES = {"llama": {}, "qwen2": {}, "gemma": {"head_dim": 16}, "granite": {"attention_multiplier": 0.5}}


def ids(*shape, seed: int = 0):
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    return started(request.param, tmp_path, **FAMILIES[request.param])


def started(family, tmp_path, **fields):
    folder = tiny_base(family, tmp_path / "base", **fields)
    model = dssk.from_base(folder, **LAYOUT).eval()
    with torch.no_grad():  # an untrained norm is 1 everywhere: nothing would tell it from a forgotten one
        for layer in model.base_model.decoder_layers():
            layer.input_layernorm.weight.normal_(std=0.3).add_(1.0)
    base_init_(model, ids(40, 50, seed=1).tolist(), storage_dtype="fp32")
    return model


@torch.no_grad()
def test_a_block_attends_as_its_layer_would(model):
    """The states of layer 2 tell exactly what layer 2's projections see: there nothing is lost by the maps."""
    block, layer = model.cross_attn_blocks[0], find_layers(model.base_model, 3)[1][2]
    contexts, hidden = ids(2, 9, seed=2), torch.randn(2, 5, 64)
    states, _ = model.encode(contexts)
    context = model.project_context(states)
    attention = layer.self_attn
    assert model.config.cross_attn_layers[0] == 2

    def heads(values):
        return values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    seen, read = layer.input_layernorm(states), layer.input_layernorm(hidden)
    keys, values = heads(attention.k_proj(seen)), heads(attention.v_proj(seen))
    torch.testing.assert_close(context.values[0], values, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(context.keys[0], keys, atol=2e-2, rtol=2e-2)
    attended = scaled_dot_product_attention(
        heads(attention.q_proj(read)), keys, values, scale=attention.scaling, enable_gqa=True
    )
    expected = GATE * attention.o_proj(attended.transpose(1, 2).flatten(2))
    found = block(hidden, context.keys[0], context.values[0]) - hidden
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "starcoder2"])  # norms of both kinds
def test_every_block_reads_and_the_start_is_saved(family, tmp_path):
    model = started(family, tmp_path)
    text, states = ids(2, 7), model.encode(ids(2, 9, seed=2))[0]
    logits = model(text, encoder_hidden_states=states).logits
    assert (logits - model(text).logits).abs().max() > 1e-3
    assert all(block.attn.c_proj.weight.any() and block.attn.shift.any() for block in model.cross_attn_blocks)
    norms = [layer.input_layernorm for layer in model.base_model.decoder_layers()]
    hidden = torch.randn(1, 3, 64)
    for block, index in zip(model.cross_attn_blocks, model.config.cross_attn_layers, strict=True):
        torch.testing.assert_close(block.ln_1(hidden), norms[index](hidden))
    model.save_pretrained(tmp_path / "blocks", cross_attn_only=True)
    loaded = type(model).from_pretrained(tmp_path / "blocks").eval()
    for name, tensor in loaded.state_dict().items():
        if "cross_attn." in name:
            assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen3", {}, "needs an input_layernorm, and an attention of q_proj, k_proj, v_proj, o_proj alone"),
        ("gpt2", {}, "does not fit a gpt2 model"),
        ("llama", {"cross_attn_num_key_value_heads": None}, "does not fit cross_attn_num_key_value_heads:"),
        ("llama", {"cross_attn_hidden_size": 32}, "cross_attn_num_attention_heads, cross_attn_hidden_size, "),
        (
            "llama",
            {"cross_attn_norm": "layer_norm", "cross_attn_final_layer": True},
            "final_layer, cross_attn_norm",
        ),
        (
            "llama",
            {"cross_attn_shared_weights": True},
            "does not fit cross_attn_shared_weights: it needs blocks of",
        ),
        ("llama", {"reader": "merged"}, "cross_attn_init base is for blocks, not for a merged reader"),
    ],
)
def test_what_it_does_not_fit_is_refused(tmp_path, family, fields, message):
    model = dssk.from_base(tiny_base(family, tmp_path), **{**LAYOUT, **fields})
    with pytest.raises(ValueError, match=message):
        check_base_init(model)
