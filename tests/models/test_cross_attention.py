import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dssk.inference.auto import CrossAttnGPTBigCodeConfig
from dssk.models.cross_attention import CrossAttention


def attention(implementation: str = "sdpa", **fields) -> CrossAttention:
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 2} | fields
    config = CrossAttnGPTBigCodeConfig(**settings, attn_implementation=implementation)
    return CrossAttention(config).eval()


def reference(ours: CrossAttention, hidden, states, mask=None):
    """The same attention by `torch.nn.MultiheadAttention`, given the same weights."""
    width = ours.num_heads * ours.head_dim
    groups = ours.num_heads // ours.num_kv_heads

    def grouped(tensor):  # repeat each key/value head for the heads of its group
        heads = tensor.view(ours.num_kv_heads, ours.head_dim, *tensor.shape[1:])
        return heads.repeat_interleave(groups, 0).reshape(width, *tensor.shape[1:])

    keys = getattr(ours, "k_attn", getattr(ours, "q_k_attn", None))
    queries = getattr(ours, "q_attn", getattr(ours, "q_k_attn", None))
    weights = [queries.weight, grouped(keys.weight), grouped(ours.v_attn.weight)]
    biases = [queries.bias, grouped(keys.bias), grouped(ours.v_attn.bias)]
    q, k, v = (x @ w.T + b for x, w, b in zip((hidden, states, states), weights, biases, strict=True))
    # Projected already: MultiheadAttention itself gets identities.
    theirs = torch.nn.MultiheadAttention(width, ours.num_heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(torch.eye(width))
        theirs.out_proj.bias.zero_()
    out, weights = theirs(
        q, k, v, key_padding_mask=None if mask is None else ~mask, average_attn_weights=False
    )
    return ours.c_proj(out), weights


LAYOUTS = [
    {},
    {"cross_attn_hidden_size": 16, "cross_attn_num_attention_heads": 2},
    {"cross_attn_num_key_value_heads": 2},
    {"cross_attn_num_key_value_heads": 1},
    {"cross_attn_shared_projections": True},
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_multihead_attention(implementation, fields, masked):
    ours = attention(implementation, **fields)
    hidden, states = torch.randn(3, 5, 32), torch.randn(3, 7, 32)
    mask = torch.rand(3, 7) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    expected, weights = reference(ours, hidden, states, mask)
    out, got_weights = ours(hidden, *ours(states), mask)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    if implementation == "eager":
        torch.testing.assert_close(got_weights, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fields", LAYOUTS)
def test_rows_that_share_a_context_attend_as_if_each_had_its_own_copy(fields):
    ours = attention("eager", **fields)
    hidden, states = torch.randn(6, 5, 32), torch.randn(2, 7, 32)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    shared, shared_weights = ours(hidden, *ours(states), mask)
    copies = ours(states.repeat_interleave(3, 0))
    alone, weights = ours(hidden, *copies, mask.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, alone)
    torch.testing.assert_close(shared_weights, weights)


def test_rows_that_cannot_share_the_contexts_evenly_are_refused():
    ours = attention()
    with pytest.raises(ValueError, match="3 decoder rows cannot share 2 contexts"):
        ours(torch.randn(3, 5, 32), *ours(torch.randn(2, 7, 32)))


@pytest.mark.parametrize("fields", LAYOUTS)
def test_a_fully_masked_context_gives_the_same_finite_output_in_every_implementation(fields):
    hidden, states = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    outputs = []
    for implementation in ("sdpa", "eager"):
        ours = attention(implementation, **fields)
        outputs.append(ours(hidden, *ours(states), mask)[0])
    assert torch.isfinite(outputs[0]).all()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(outputs[0][1], ours.c_proj.bias.expand(5, -1))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), padding=st.integers(0, 6))
def test_padding_and_permuting_context_tokens_change_nothing(seed, length, padding):
    generator = torch.Generator().manual_seed(seed)
    ours = attention()
    hidden, states = (
        torch.randn(2, 3, 32, generator=generator),
        torch.randn(2, length, 32, generator=generator),
    )
    plain, _ = ours(hidden, *ours(states))
    order = torch.randperm(length + padding, generator=generator)
    padded = torch.cat([states, 100 * torch.randn(2, padding, 32, generator=generator)], 1)[:, order]
    mask = (torch.arange(length + padding) < length).expand(2, -1)[:, order]
    torch.testing.assert_close(ours(hidden, *ours(padded), mask)[0], plain, atol=1e-5, rtol=1e-5)


def test_flash_attention_gets_no_mask_and_a_masked_context_goes_through_sdpa(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def flash(module, query, key, value, mask, scaling, dropout):
        seen.append(mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, scaling=scaling, dropout=dropout
        )

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    ours = attention()
    hidden, states = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    expected = ours(hidden, *ours(states), mask)[0]
    ours.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(ours(hidden, *ours(states))[0], expected)
    torch.testing.assert_close(ours(hidden, *ours(states), mask)[0], expected)
    assert seen == [None]
