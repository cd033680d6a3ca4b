"""A closed-form start for the last cross-attention block: it copies from the context before any training.

From the default start, real text gives the blocks little to follow: the loss falls for a long time without them
looking into the context. This start makes the last block an induction head (Olsson et al., 2022, arXiv 2209.11895):
where the decoder has read some words, look for the same words in the context and bring the token that came next.
All of it is ridge regression from frozen states to tokens, on a sample of contexts; no gradient is taken.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

from dssk.models.configuration import CrossAttnConfig
from dssk.models.modeling import CrossAttnForCausalLM

GAIN = 2.0  # size of what is copied, in sizes of the decoder's own states
SHARPNESS = 6.0  # logit of a token that fits the query, where one that does not has about 0
PENALTY = 1e-2  # of the regressions, relative to the mean variance of a state
MAX_TOKENS = 40_000  # more make no better regression


def check_copy_init(config: CrossAttnConfig) -> None:
    """Raise `ValueError` for a layout that the closed form does not fit."""
    heads, kv_heads = config.cross_attn_num_attention_heads, config.cross_attn_num_key_value_heads
    fits = {
        "cross_attn_hidden_size": config.cross_attn_hidden_size == config.hidden_size,
        "cross_attn_num_key_value_heads": kv_heads == heads,
        "cross_attn_shared_projections": not config.cross_attn_shared_projections,
        "cross_attn_shared_weights": not config.cross_attn_shared_weights,
        "cross_attn_final_layer": config.cross_attn_final_layer,
    }
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise ValueError(
            f"cross_attn_init copy does not fit {', '.join(wrong)}: it needs a block of its own weights, as wide as "
            "the decoder, with a key/value head for each head, after the last layer"
        )


@torch.no_grad()
def copy_init_(model: CrossAttnForCausalLM, contexts: Iterable[list[int]], seed: int = 0) -> None:
    """Set the attention of the last block, given the tokens of contexts as they are encoded.

    Each head compares a query made of the token just read and the one before it with keys made of the token before
    and the second before: where they agree, the context's own token comes next. The other blocks keep their start.
    """
    check_copy_init(model.config)
    states, hidden_states, tokens = _sample(model, contexts)  # (N, d), (N, d), (N, 3)
    own, previous, second = tokens.unbind(1)
    block: Any = model.cross_attn_blocks[0]  # the last layer's
    attention = block.attn
    inputs = block.ln_1(hidden_states.to(block.ln_1.weight)).float()
    generator = torch.Generator().manual_seed(seed)
    half = attention.head_dim // 2
    for head in range(attention.num_heads):
        codes = torch.randn(model.config.vocab_size, half, generator=generator).to(states.device)
        codes = F.normalize(codes, dim=1) * math.sqrt(SHARPNESS / attention.scaling)
        rows = slice(head * attention.head_dim, head * attention.head_dim + 2 * half)
        _set(attention.q_attn, rows, *_ridge(inputs, torch.cat([codes[own], codes[previous]], 1)))
        _set(attention.k_attn, rows, *_ridge(states, torch.cat([codes[previous], codes[second]], 1)))

    # The value is the context's token, and the output passes it on. They share the gain: a large and a small matrix
    # would not train well at one learning rate.
    embeddings = model.get_input_embeddings().weight.float()
    weight, bias = _ridge(states, (embeddings - embeddings.mean(0))[own])
    gain = (GAIN * _size(hidden_states) / _size(states @ weight.T + bias)).sqrt()
    everything = slice(None)
    _set(attention.v_attn, everything, weight * gain, bias * gain)
    _set(
        attention.c_proj, everything, torch.eye(len(bias), device=gain.device) * gain, torch.zeros_like(bias)
    )


def _sample(
    model: CrossAttnForCausalLM, contexts: Iterable[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of about `MAX_TOKENS` tokens: encoder states, the decoder's states after its last layer, and the token with
    the two before it."""
    states: list[torch.Tensor] = []
    hidden_states: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    last_layer = model.base_model.decoder_layers()[-1]
    hook = last_layer.register_forward_hook(
        lambda _, args, output: hidden_states.append(
            (output[0] if isinstance(output, tuple) else output)[0, 2:]
        )
    )
    try:
        for context in contexts:
            ids = torch.tensor(context, device=model.device)
            if len(ids) > 2:
                states.append(model.encode(ids[None])[0][0, 2:])
                tokens.append(torch.stack([ids[2:], ids[1:-1], ids[:-2]], 1))
            if sum(map(len, tokens)) >= MAX_TOKENS:
                break
    finally:
        hook.remove()
    return torch.cat(states).float(), torch.cat(hidden_states).float(), torch.cat(tokens)


def _ridge(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out,) of the ridge regression of `y` (N, out) on `x` (N, in)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram += PENALTY * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y)).T
    return weight, mean_y - weight @ mean_x


def _size(values: torch.Tensor) -> torch.Tensor:
    return values.pow(2).mean().sqrt()


def _set(linear: torch.nn.Linear, rows: slice, weight: torch.Tensor, bias: torch.Tensor) -> None:
    linear.weight[rows] = weight.to(linear.weight.dtype)
    linear.bias[rows] = bias.to(linear.bias.dtype)
