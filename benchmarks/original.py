"""The published original's way of training, rebuilt as plainly as the contract allows, for comparison only.

Same weights and same result as ours, but: full logits and a full fp32 loss, eager attention, keys and values
projected by each block for itself, and a mask expanded to the size of the scores and added to them.
"""

import torch
from torch import nn

from dssk.models.cross_attention import CrossAttention
from dssk.models.modeling import CrossAttnForCausalLM


class OriginalLayer(nn.Module):
    """A decoder layer preceded or followed by its cross-attention block."""

    def __init__(self, layer, block, final: bool):
        super().__init__()
        self.layer, self.block, self.final = layer, block, final

    def forward(self, hidden_states, *args, states=None, mask=None, **kwargs):
        if not self.final:
            hidden_states = self.cross(hidden_states, states, mask)
        hidden_states = self.layer(hidden_states, **kwargs)  # no context is set: it is the base's own
        return self.cross(hidden_states, states, mask) if self.final else hidden_states

    def cross(self, hidden_states, states, mask):
        hidden_states = hidden_states + attend(self.block.attn, self.block.ln_1(hidden_states), states, mask)
        return hidden_states + self.block.mlp(self.block.ln_2(hidden_states))


def attend(attention: CrossAttention, hidden_states, states, mask):
    """Textbook multi-head attention with a full additive mask (B, H, T, S)."""
    rows, tokens, _ = hidden_states.shape
    queries = attention.q_attn(hidden_states).view(rows, tokens, attention.num_heads, -1).transpose(1, 2)
    keys, values = attention(states)
    scores = queries @ keys.transpose(2, 3) * attention.scaling
    blocked = torch.full_like(scores, torch.finfo(scores.dtype).min)
    scores = torch.where(mask[:, None, None, :].expand_as(scores), scores, blocked)
    weights = torch.softmax(scores, dim=-1)
    return attention.c_proj((weights @ values).transpose(1, 2).reshape(rows, tokens, -1))


class Original(nn.Module):
    """Takes over `model`, which must have been loaded with eager attention."""

    def __init__(self, model: CrossAttnForCausalLM):
        super().__init__()
        self.model = model
        blocks, layers = model.cross_attn_blocks, model.base_model.decoder_layers()
        for number, index in enumerate(model.config.cross_attn_layers):
            layers[index] = OriginalLayer(
                layers[index], blocks[number % len(blocks)], model.config.cross_attn_final_layer
            )

    def forward(self, input_ids, states, mask, labels):
        """The mean cross-entropy of labelled next tokens."""
        hidden_states = self.model.base_model(
            input_ids, use_cache=False, states=states, mask=mask
        ).last_hidden_state
        logits = self.model.lm_head(hidden_states).float()
        shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
        return nn.functional.cross_entropy(shifted, labels[:, 1:].reshape(-1))
