"""A tiny model of every family of decoders that can read a cached context."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCAB_SIZE = 64
_COMMON = {  # families name the same things differently; each takes what it knows
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "intermediate_size", "ffn_dim"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "vocab_size": VOCAB_SIZE,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # at the usual 0.02 so small a model hardly tells inputs apart
}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict] = {
    **dict.fromkeys(
        "gpt_bigcode llama mistral qwen2 starcoder2 phi phi3 gpt2 gpt_neox opt olmo olmo2 olmo3 smollm3 granite "
        "cohere2 falcon bloom mpt stablelm nemotron exaone4 ernie4_5 lfm2 mamba".split(),
        {},
    ),
    **dict.fromkeys("qwen3 gemma gemma2 gemma3_text glm4 seed_oss".split(), {"head_dim": 16}),
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"head_dim": 16, **_EXPERTS},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gptj": {"rotary_dim": 8},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
        **{"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8},
        **{"qk_nope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32, "num_key_value_heads": 4},
    },
}


def tiny_config(name: str, **fields) -> PreTrainedConfig:
    """A configuration of three layers, 64 wide; `fields` override it."""
    plain = AutoConfig.for_model(name)
    known = {*plain.to_dict(), *plain.attribute_map}
    wanted = {key: value for key, value in _COMMON.items() if key in known}
    return AutoConfig.for_model(name, **{**wanted, **FAMILIES.get(name, {}), **fields})


def tiny_base(name: str, folder: Path, **fields) -> Path:
    """Save a random tiny model of a family."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(name, **fields)).save_pretrained(folder)
    return folder
