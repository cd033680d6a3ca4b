"""Windows and KV arithmetic, held against caches that tiny models of many families have filled."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dssk.inference.auto import family, fused_config
from dssk.models.shapes import UNBOUNDED, kv_cache_values, mlp_values, projected_values, window
from tests.families import tiny_config

TOKENS = 7
GROUPED = 3 * 2 * 2 * 16  # layers x (keys and values) x key/value heads x head size
EVERY_HEAD = 2 * GROUPED
WIDE = {"head_dim": 32}  # more than the hidden size has for each head
SHAPES = [
    ("gpt_bigcode", {"multi_query": True}, 3 * 2 * 16),
    ("gpt_bigcode", {"multi_query": False}, EVERY_HEAD),
    ("mistral", {"sliding_window": 4}, GROUPED),
    *(
        (family, {}, GROUPED)
        for family in "llama mixtral qwen2 starcoder2 phi phi3 olmo2 smollm3 granite".split()
    ),
    *((family, {}, GROUPED) for family in "stablelm cohere2".split()),
    *(
        (family, WIDE, 2 * GROUPED)
        for family in "qwen3 qwen3_moe gemma gemma2 gemma3_text glm4 gpt_oss".split()
    ),
    *((family, {}, EVERY_HEAD) for family in "gpt2 gpt_neox gptj opt bloom mpt".split()),
    ("falcon", {"multi_query": True}, 3 * 2 * 16),
    ("falcon", {"multi_query": False}, EVERY_HEAD),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, EVERY_HEAD),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, GROUPED // 3),
    ("deepseek_v3", {"kv_lora_rank": 24}, 3 * (24 + 8)),
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
    assert window(tiny_config(family)) == 64


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
    assert mlp_values(tiny_config("qwen3_moe", num_experts_per_tok=2)) == 2 * 32
