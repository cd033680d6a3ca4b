"""A closed-form start for the last cross-attention block: it copies from the context before any training.

From the default start, real text gives the blocks little to follow: the loss falls for a long time without them
looking into the context. This start makes the last block an induction head (Olsson et al., 2022, arXiv 2209.11895):
where the decoder has read some words, look for the same words in the context and bring the token that came next.
All of it is ridge regression from frozen states to tokens, on a sample of contexts; no gradient is taken.

With `cross_attn_init: overlap` it also prefers, among such places, those whose context had as rare words before as the
decoder has read: which of several contexts a question is about is found by the words that they share.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dssk.models.configuration import OVERLAP, CrossAttnConfig
from dssk.models.modeling import CrossAttnForCausalLM

GAIN = 2.0  # size of what is copied, in sizes of the decoder's own states
SHARPNESS = 6.0  # logit of a token that fits the query, where one that does not has about 0
WORD_SHARPNESS = 0.5  # logit of a word that both have had, times its squared inverse document frequency
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
            f"cross_attn_init {config.cross_attn_init} does not fit {', '.join(wrong)}: it needs a block of its own "
            "weights, as wide as the decoder, with a key/value head for each head, after the last layer"
        )


class Sample(NamedTuple):
    """N tokens of some contexts, each with two before it."""

    contexts: list[torch.Tensor]  # the tokens of each, with the two that the others lack
    states: torch.Tensor  # (N, d) as they are encoded
    hidden_states: torch.Tensor  # (N, d) of the decoder, after its last layer
    tokens: torch.Tensor  # (N, 3) each with the one and the second before it


@torch.no_grad()
def copy_init_(model: CrossAttnForCausalLM, contexts: Iterable[list[int]], seed: int = 0) -> None:
    """Set the attention of the last block, given the tokens of contexts as they are encoded.

    Each head compares a query made of the token just read and the one before it with keys made of the token before
    and the second before: where they agree, the context's own token comes next. Half of each head compares all
    words read so far, if the configuration says `overlap`. The other blocks keep their start.
    """
    check_copy_init(model.config)
    sample = _sample(model, contexts)
    states, hidden_states = sample.states, sample.hidden_states
    own, previous, second = sample.tokens.unbind(1)
    block: Any = model.cross_attn_blocks[0]  # the last layer's
    attention = block.attn
    inputs = block.ln_1(hidden_states.to(block.ln_1.weight)).float()
    generator = torch.Generator().manual_seed(seed)

    def random_codes(size: int) -> torch.Tensor:
        codes = torch.randn(model.config.vocab_size, size, generator=generator).to(states.device)
        return F.normalize(codes, dim=1) / math.sqrt(attention.scaling)

    words = attention.head_dim // 2 if model.config.cross_attn_init == OVERLAP else 0
    half = (attention.head_dim - words) // 2
    for head in range(attention.num_heads):
        codes = random_codes(half) * math.sqrt(SHARPNESS)
        queries, keys = [codes[own], codes[previous]], [codes[previous], codes[second]]
        if words:
            codes = random_codes(words) * math.sqrt(WORD_SHARPNESS) * rarity(sample.contexts, len(codes))
            had = torch.cat([words_before(ids, codes)[2:] for ids in sample.contexts])
            queries.append(had)
            keys.append(had)
        rows = slice(head * attention.head_dim, head * attention.head_dim + 2 * half + words)
        _set(attention.q_attn, rows, *_ridge(inputs, torch.cat(queries, 1)))
        _set(attention.k_attn, rows, *_ridge(states, torch.cat(keys, 1)))

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


def rarity(contexts: list[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """The inverse document frequency of each token (V, 1): log of contexts over those that have it."""
    having = torch.zeros(vocab_size, device=contexts[0].device)
    for ids in contexts:
        having[ids.unique()] += 1
    return torch.log(len(contexts) / having.clamp(min=1))[:, None]


def words_before(ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The sum of the codes (V, D) of all different tokens up to each of `ids` (T,); (T, D)."""
    distinct, inverse = ids.unique(return_inverse=True)
    places = torch.arange(len(ids), device=ids.device)
    first = places.new_zeros(len(distinct)).scatter_reduce(0, inverse, places, "amin", include_self=False)
    new = torch.zeros_like(codes[ids])
    new[first] = codes[distinct]
    return new.cumsum(0)


def _sample(model: CrossAttnForCausalLM, contexts: Iterable[list[int]]) -> Sample:
    """About `MAX_TOKENS` tokens of the first contexts."""
    taken: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    hidden_states: list[torch.Tensor] = []
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
                taken.append(ids)
                states.append(model.encode(ids[None])[0][0, 2:])
            if sum(map(len, states)) >= MAX_TOKENS:
                break
    finally:
        hook.remove()
    tokens = torch.cat([torch.stack([ids[2:], ids[1:-1], ids[:-2]], 1) for ids in taken])
    return Sample(taken, torch.cat(states).float(), torch.cat(hidden_states).float(), tokens)


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
