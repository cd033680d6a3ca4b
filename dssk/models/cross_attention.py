"""The cross-attention block. It does not depend on the family of the decoder.

Shapes: C contexts, r decoder rows on each context, B = C * r decoder rows, T decoder tokens, S context tokens,
H attention heads, K key/value heads, G = H / K, D head size, E = H * D width, d hidden size of the decoder.

Neither the keys nor the mask depend on the query, and nothing here is causal. So the queries of all rows that share a
context, and of all heads that share a key, are concatenated into one long query against the same keys: no key or value
is repeated for beams, sampled sequences, questions or grouped heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dssk.models.configuration import BASE, activation, norm_eps
from dssk.models.merged import normalized
from dssk.models.packing import picked_tokens


class CrossAttnLinear(nn.Linear):
    """A projection of a block; a class of its own so that weight initialization finds it."""


class CrossAttnOutput(CrossAttnLinear):
    """A projection whose output joins the residual stream; all zeros, it makes its block the identity."""


@dataclass(frozen=True)
class ProjectedContext:
    """Keys and values of C contexts, ready to be attended to by any number of decoder rows.

    Made by `project_context` of a fused model, once a context; not changed by generation, and its own deep copy.
    """

    keys: tuple[torch.Tensor, ...]  # (C, K, S, D) for each set of block weights
    values: tuple[torch.Tensor, ...]  # (C, K, S, D)
    mask: torch.Tensor | None  # (C, S) boolean, True = attend; None where every token is visible

    def __len__(self) -> int:
        return self.keys[0].shape[0]

    def __deepcopy__(self, memo: dict) -> "ProjectedContext":
        return self  # generation copies its arguments; nothing here is ever written to

    def of_rows(self, numbers: list[int]) -> "ProjectedContext":
        """Select a context for each decoder row by its number; a number may repeat."""
        keys, values = (tuple(t[numbers] for t in tensors) for tensors in (self.keys, self.values))
        return ProjectedContext(keys, values, None if self.mask is None else self.mask[numbers])

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    def gathered(self, tokens: torch.Tensor, mask: torch.Tensor) -> "ProjectedContext":
        """From packed contexts, gather the `tokens` (B, L) that each row reads; `mask` (B, L) is False at padding."""
        keys = tuple(picked_tokens(tensor, tokens) for tensor in self.keys)
        return ProjectedContext(keys, tuple(picked_tokens(tensor, tokens) for tensor in self.values), mask)


class CrossAttention(nn.Module):
    """Multi-head attention from the decoder's states to a context's, through transformers' attention interface."""

    is_causal = False
    num_key_value_groups = 1  # grouped heads are folded into the query's length
    # Only with `cross_attn_init: base`: standardization of normalized states, (d,) each.
    shift: torch.Tensor  # mean
    scale: torch.Tensor  # one over the standard deviation

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.num_heads: int = config.cross_attn_num_attention_heads
        self.num_kv_heads: int = config.cross_attn_num_key_value_heads
        width: int = config.cross_attn_hidden_size
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        kv_width = self.num_kv_heads * self.head_dim
        if config.cross_attn_shared_projections:
            self.q_k_attn = CrossAttnLinear(config.hidden_size, width)
        else:
            self.q_attn = CrossAttnLinear(config.hidden_size, width)
            self.k_attn = CrossAttnLinear(config.hidden_size, kv_width)
        self.v_attn = CrossAttnLinear(config.hidden_size, kv_width)
        self.c_proj = CrossAttnOutput(width, config.hidden_size)
        self.standardizes: bool = config.cross_attn_init == BASE
        if self.standardizes:
            self.register_buffer("shift", torch.zeros(config.hidden_size))
            self.register_buffer("scale", torch.ones(config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `hidden_states` (B, T, d); returns (B, T, d) and, if eager, the weights (B, H, T, S).

        A row whose context is masked throughout gets an attention output of zero, in every implementation. Without
        keys, `hidden_states` (C, S, d) are a context's: returns its keys and values, (C, K, S, D) each. This is a
        module call as well because sharding and offloading load weights in forward hooks.
        """
        if keys is None or values is None:
            return self._project(hidden_states.to(self.v_attn.weight.dtype))
        rows, tokens, _ = hidden_states.shape
        contexts, groups = keys.shape[0], self.num_heads // self.num_kv_heads
        if rows % contexts:
            raise ValueError(f"{rows} decoder rows cannot share {contexts} contexts evenly")
        to_queries = self.q_k_attn if self.config.cross_attn_shared_projections else self.q_attn
        queries = to_queries(hidden_states).view(contexts, -1, self.num_kv_heads, groups, self.head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (C, K, G * r * T, D)

        implementation = self.config._attn_implementation
        if mask is not None and "flash" in (implementation or ""):
            implementation = "sdpa"  # flash kernels take no mask over keys other than the queries' padding
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        attended, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask(mask, implementation, queries.dtype),
            scaling=self.scaling,
            dropout=0.0,
        )  # (C, G * r * T, K, D)
        if mask is not None:
            attended = attended * mask.any(-1)[:, None, None, None]
        attended = attended.view(contexts, groups, -1, self.num_kv_heads, self.head_dim)
        attended = attended.permute(0, 2, 3, 1, 4).reshape(rows, tokens, -1)  # (B, T, E)
        if weights is not None and implementation == "eager":
            weights = weights.view(contexts, self.num_kv_heads, groups, -1, tokens, keys.shape[2])
            weights = weights.permute(0, 3, 1, 2, 4, 5).reshape(rows, self.num_heads, tokens, -1)
        return self.c_proj(attended), weights

    def _project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (C, K, S, D) of encoder states (C, S, d)."""
        to_keys = self.q_k_attn if self.config.cross_attn_shared_projections else self.k_attn
        if self.standardizes:
            states = (normalized(states) - self.shift) * self.scale
        split = (*states.shape[:-1], self.num_kv_heads, self.head_dim)
        return to_keys(states).view(split).transpose(1, 2), self.v_attn(states).view(split).transpose(1, 2)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, in transformers' interface: (C, K, Q, D) queries to (C, Q, K, D), and the weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def attention_mask(
    mask: torch.Tensor | None, implementation: str | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """A boolean mask over context tokens (C, S) as `implementation` takes it, the same for every query."""
    if mask is None or implementation == "sdpa":
        return None if mask is None else mask[:, None, None, :]
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


class CrossAttnMLP(nn.Module):
    """d -> 4E -> d with the decoder's activation."""

    def __init__(self, config: Any):
        super().__init__()
        inner = 4 * config.cross_attn_hidden_size
        self.c_fc = CrossAttnLinear(config.hidden_size, inner)
        self.act = ACT2FN[activation(config)]
        self.c_proj = CrossAttnOutput(inner, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(hidden_states)))


class CrossAttnGatedMLP(nn.Module):
    """d -> 8/3 E -> d with a gate, as many weights as a plain one (Shazeer, "GLU Variants", 2020, arXiv 2002.05202)."""

    def __init__(self, config: Any):
        super().__init__()
        inner = -(-8 * config.cross_attn_hidden_size // 3 // 8) * 8
        self.gate_proj = CrossAttnLinear(config.hidden_size, inner, bias=False)
        self.c_fc = CrossAttnLinear(config.hidden_size, inner, bias=False)
        self.act = ACT2FN[activation(config)]
        self.c_proj = CrossAttnOutput(inner, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.gate_proj(hidden_states)) * self.c_fc(hidden_states))


NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
MLPS = {"plain": CrossAttnMLP, "gated": CrossAttnGatedMLP}


class CrossAttnBlock(GradientCheckpointingLayer):
    """`h + CrossAttention(norm1(h), context)`, then `h + MLP(norm2(h))`."""

    def __init__(self, config: Any):
        super().__init__()
        norm = NORMS[config.cross_attn_norm]
        self.ln_1 = norm(config.hidden_size, eps=norm_eps(config))
        self.attn = CrossAttention(config)
        self.ln_2 = norm(config.hidden_size, eps=norm_eps(config))
        self.mlp = MLPS[config.cross_attn_mlp](config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The decoder's states (B, T, d) after this block, in the dtype and on the device they came in."""
        # The blocks may train in fp32 inside a decoder kept in half precision.
        states = hidden_states.to(self.ln_1.weight.dtype)
        states = states + self.attn(self.ln_1(states), keys, values, mask)[0]
        states = states + self.mlp(self.ln_2(states))
        return states.to(hidden_states)
