"""A closed-form start for cross-attention blocks: each attends as the self-attention of its own layer would.

Norm, queries and output projection of a block are those of the layer that it stands before. Its keys and values are
maps from stored states to what that layer's own projections would give for the same tokens, the ridge regression of
`dssk.inference.calibrate`; states are divided by their root mean square and standardised, as for the merged reader.
What a block adds is scaled by `GATE`, as it comes on top of the layer's own attention. Its MLP starts at zero.

Blocks have no positions, so neither queries nor keys are rotated: docs/readers.md says what that costs.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dssk.inference.calibrate import FIT_TOKENS, Tokens, first_tokens, fit, reader_for
from dssk.inference.rounding import DEFAULT_STORAGE, StorageDtype
from dssk.models.configuration import base_norm

GATE = 0.3  # of what a block adds, in sizes of the layer's own attention
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")  # all that such a layer's attention consists of


def check_base_init(model: Any) -> None:
    """Raise `ValueError` for blocks or a base that the start does not fit; a model without weights (meta) will do."""
    config = model.config
    if config.reader != "cross_attention":
        raise ValueError(f"cross_attn_init base is for blocks, not for a {config.reader} reader")
    layer = model.base_model.decoder_layers()[0]
    attention: Any = getattr(layer, "self_attn", None)
    norm = getattr(layer, "input_layernorm", None)
    parts = {name.partition(".")[0] for name, _ in attention.named_parameters()} if attention else set()
    if norm is None or parts != set(PROJECTIONS):
        raise ValueError(
            f"cross_attn_init base does not fit a {config.model_type} model: it needs an input_layernorm, and an "
            f"attention of {', '.join(PROJECTIONS)} alone"
        )
    block = model.cross_attn_blocks[0].attn
    fits = {
        "cross_attn_final_layer": not config.cross_attn_final_layer,
        "cross_attn_shared_weights": not config.cross_attn_shared_weights,
        "cross_attn_shared_projections": not config.cross_attn_shared_projections,
        "cross_attn_norm": config.cross_attn_norm == base_norm(config),
    }
    if all(fits.values()):
        fits["cross_attn_num_attention_heads"] = block.head_dim == attention.head_dim
        fits["cross_attn_hidden_size"] = block.q_attn.out_features == attention.q_proj.out_features
        fits["cross_attn_num_key_value_heads"] = block.k_attn.out_features == attention.k_proj.out_features
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise ValueError(
            f"cross_attn_init base does not fit {', '.join(wrong)}: it needs blocks of their own weights before their "
            "layers, with heads and norms as the base's"
        )


@torch.no_grad()
def base_init_(
    model: Any,
    texts: Iterable[Tokens],
    storage_dtype: StorageDtype = DEFAULT_STORAGE,
    num_tokens: int = FIT_TOKENS,
) -> None:
    """Set every block, with maps fitted on about `num_tokens` tokens of contexts as they are encoded."""
    check_base_init(model)
    stored = model.config.encode_layers
    plain = model.plain_base().eval()
    reader = reader_for(plain, stored)
    equations = fit(plain, reader, first_tokens(texts, num_tokens), [stored], storage_dtype)[stored]
    matrix, bias = equations.solve()
    widths = [width for width, _ in reader.widths]  # keys and values of layer 0, of layer 1, ...
    maps = list(zip(matrix.split(widths), bias.split(widths), strict=True))
    layers: Any = model.base_model.decoder_layers()
    for block, index in zip(model.cross_attn_blocks, model.config.cross_attn_layers, strict=True):
        layer, attention = layers[index], block.attn
        _copy_norm(block.ln_1, layer.input_layernorm)
        size = layer.self_attn.scaling / attention.scaling  # families scale scores differently
        _set(attention.q_attn, *_weights(layer.self_attn.q_proj), size)
        _set(attention.c_proj, *_weights(layer.self_attn.o_proj), GATE)
        _set(attention.k_attn, *maps[2 * index])
        _set(attention.v_attn, *maps[2 * index + 1])
        attention.shift.copy_(equations.mean)
        attention.scale.copy_(1 / equations.deviation)


def _copy_norm(norm: Any, base: Any) -> None:
    if isinstance(norm, nn.LayerNorm):
        norm.load_state_dict(base.state_dict())
    else:  # some families keep their weight less one: what comes of ones is the weight as it acts
        norm.weight.copy_(base(torch.ones_like(base.weight)))


def _weights(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return linear.weight, bias


def _set(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor, factor: float = 1.0) -> None:
    linear.weight.copy_(weight * factor)
    linear.bias.copy_(bias * factor)
