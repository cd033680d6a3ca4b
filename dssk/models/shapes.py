"""What a decoder's configuration says about its window and its KV cache, whatever its family names them.

Only configurations are read; no model is built. `tests/models/test_shapes.py` holds the figures against the
caches that models of every family really fill.
"""

from transformers import PretrainedConfig

UNBOUNDED = 1 << 20  # tokens: the window of a family that knows no positions (bloom's ALiBi, mamba's state)

_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_LAYER_TYPE_NAMES = ("layer_types", "layers_block_type")


def window(config: PretrainedConfig) -> int:
    """Positions that one text may take; `UNBOUNDED` for families that have no limit of their own."""
    text = config.get_text_config()
    for name in _WINDOW_NAMES:
        positions = getattr(text, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return UNBOUNDED


def context_window(config: PretrainedConfig) -> int:
    """Tokens that a context may have by default: all positions, of which a merged reader leaves a quarter to the text.

    Blocks give a context none of the decoder's positions, where a merged reader's text goes on behind it.
    """
    positions = window(config)
    return positions - positions // 4 if getattr(config, "reader", None) == "merged" else positions


def kv_cache_values(config: PretrainedConfig) -> int:
    """Keys and values that a KV cache holds for each token, over all layers.

    Layers without attention (convolutions, state spaces) hold none. A layer with a sliding window counts like
    any other: it holds as much for each token that is still inside its window.
    """
    text = config.get_text_config()
    layers = _attention_layers(text)
    return layers * _values_per_layer(text) if layers else 0


def projected_values(config: PretrainedConfig) -> int:
    """Keys and values that a fused model's reader holds for each context token once it is projected."""
    if config.reader == "merged":
        return kv_cache_values(config)
    blocks = 1 if config.cross_attn_shared_weights else config.num_cross_attn_layers
    head_dim = config.cross_attn_hidden_size // config.cross_attn_num_attention_heads
    return blocks * 2 * config.cross_attn_num_key_value_heads * head_dim


def mlp_values(config: PretrainedConfig) -> int:
    """Width of the hidden layer of a decoder layer's MLP; of those that one token runs through, if it has experts."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "ffn_dim")
    width = next((w for name in names if (w := getattr(config, name, None))), 4 * config.hidden_size)
    return width * (getattr(config, "num_experts_per_tok", None) or 1)


def _attention_layers(config: PretrainedConfig) -> int:
    for name in _LAYER_TYPE_NAMES:
        if types := getattr(config, name, None):
            return sum("attention" in kind and kind != "linear_attention" for kind in types)
    return config.num_hidden_layers if hasattr(config, "num_attention_heads") else 0


def _heads(config: PretrainedConfig) -> int:
    """Key/value heads that the cache of a layer with attention holds."""
    if getattr(config, "new_decoder_architecture", False):  # falcon's: it repeats its groups before it caches
        return config.num_attention_heads
    if getattr(config, "multi_query", False):
        return 1
    # gpt_bigcode may have both names, and ignores the second.
    name = "num_kv_heads" if hasattr(config, "multi_query") else "num_key_value_heads"
    return getattr(config, name, None) or config.num_attention_heads


def _values_per_layer(config: PretrainedConfig) -> int:
    """Values that one layer with attention holds for each token."""
    # MLA: one latent for keys and values, and the rotary key.
    if rank := getattr(config, "kv_lora_rank", None):
        return rank + config.qk_rope_head_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * _heads(config) * head_dim
