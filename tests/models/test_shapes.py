"""Windows and KV arithmetic, held against caches that tiny models of many families have filled."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dssk.inference.auto import family, fused_config
from dssk.models.shapes import UNBOUNDED, kv_cache_values, mlp_values, projected_values, window

TOKENS = 7
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32,
    "d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 32, "word_embed_proj_dim": 64, "ffn_dim": 64,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "num_local_experts": 2, "moe_intermediate_size": 32}
MLA = {
    "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4,
    "kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
GROUPED = 4 * 2 * 2 * 16  # layers x (keys and values) x key/value heads x head size
EVERY_HEAD = 2 * GROUPED
SHAPES = [
    ("gpt_bigcode", {"multi_query": True}, 4 * 2 * 16),
    ("gpt_bigcode", {"multi_query": False}, EVERY_HEAD),
    ("llama", {}, GROUPED),
    ("mistral", {"sliding_window": 4}, GROUPED),
    ("mixtral", EXPERTS, GROUPED),
    ("qwen2", {}, GROUPED),
    ("qwen3", {"head_dim": 32}, 2 * GROUPED),
    ("qwen3_moe", {"head_dim": 32, **EXPERTS}, 2 * GROUPED),
    ("starcoder2", {}, GROUPED),
    ("gemma", {"head_dim": 32}, 2 * GROUPED),
    ("gemma2", {"head_dim": 32, "sliding_window": 16}, 2 * GROUPED),
    ("gemma3_text", {"head_dim": 32, "sliding_window": 16}, 2 * GROUPED),
    ("phi", {}, GROUPED),
    ("phi3", {}, GROUPED),
    ("gpt2", {}, EVERY_HEAD),
    ("gpt_neox", {}, EVERY_HEAD),
    ("gptj", {}, EVERY_HEAD),
    ("opt", {}, EVERY_HEAD),
    ("bloom", {}, EVERY_HEAD),
    ("mpt", {}, EVERY_HEAD),
    ("falcon", {"multi_query": True}, 4 * 2 * 16),
    ("falcon", {"multi_query": False}, EVERY_HEAD),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, EVERY_HEAD),
    ("olmo2", {}, GROUPED),
    ("smollm3", {}, GROUPED),
    ("granite", {}, GROUPED),
    ("stablelm", {}, GROUPED),
    ("cohere2", {}, GROUPED),
    ("glm4", {"head_dim": 32}, 2 * GROUPED),
    ("gpt_oss", {"head_dim": 32, **EXPERTS}, 2 * GROUPED),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}, GROUPED // 2),
    ("deepseek_v3", MLA, 4 * (24 + 8)),
    ("mamba", {}, 0),
]


@pytest.mark.parametrize(("family", "fields", "values"), SHAPES, ids=[f"{s[0]}-{s[2]}" for s in SHAPES])
def test_kv_cache_values_are_those_of_a_filled_cache(family, fields, values):
    config = tiny_config(family, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(3, 64, (1, TOKENS)), use_cache=True).get("past_key_values")
    layers = (
        [] if cache is None else [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    )
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    if family == "mistral":  # of a window of 4 a cache keeps the 3 tokens that the next one will see
        assert cached == 3 * values
    else:
        assert cached == TOKENS * values
    assert kv_cache_values(config) == values


@pytest.mark.parametrize("family", sorted({family for family, _, _ in SHAPES} - {"bloom", "mamba"}))
def test_the_window_is_found_under_every_name(family):
    assert window(tiny_config(family)) == 32


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_families_without_positions_have_no_bound(family):
    assert window(tiny_config(family)) == UNBOUNDED


def test_the_text_part_of_a_composite_configuration_counts():
    whole = AutoConfig.for_model(
        "gemma3", text_config={"num_hidden_layers": 2, "max_position_embeddings": 77}
    )
    assert window(whole) == 77
    assert kv_cache_values(whole) == kv_cache_values(whole.text_config)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_cross_attn_layers": 2, "cross_attn_layers_stride": 2},
        {"num_cross_attn_layers": 2, "cross_attn_shared_weights": True},
        {"num_cross_attn_layers": 3, "cross_attn_num_key_value_heads": "base"},
        {
            "cross_attn_hidden_size": 32,
            "cross_attn_num_attention_heads": 8,
            "cross_attn_num_key_value_heads": 2,
        },
    ],
)
def test_projected_values_are_those_of_a_projected_context(fields):
    config = fused_config(tiny_config("llama"), **fields)
    context = family("llama").causal_lm(config).project_context(torch.randn(1, TOKENS, 64))
    assert projected_values(config) == context.nbytes / 4 / TOKENS


def test_the_width_of_an_mlp_counts_the_experts_of_one_token():
    assert mlp_values(tiny_config("llama")) == 64
    assert mlp_values(tiny_config("gpt2")) == 4 * 64
    assert mlp_values(tiny_config("opt")) == 64
    assert mlp_values(tiny_config("qwen3_moe", **{**EXPERTS, "num_experts_per_tok": 2})) == 2 * 32


def tiny_config(family, **fields):
    """A configuration of four layers, 64 wide, whatever the family names its fields."""
    known = AutoConfig.for_model(family)
    names = {*known.to_dict(), *known.attribute_map}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    return AutoConfig.for_model(family, **{**sizes, **fields})
