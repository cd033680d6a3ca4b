"""The frozen base model: loading it, and encoding contexts with it."""

from pathlib import Path

import torch
from transformers import AutoConfig, GPTBigCodeConfig, GPTBigCodeForCausalLM

from dssk.errors import DsskError
from dssk.models.configuration import CrossAttnGPTBigCodeConfig


def load_base_config(path: str | Path, revision: str | None = None, fused: bool = False) -> GPTBigCodeConfig:
    """The configuration of a base model: a folder, or a name on the Hub. Anything but GPTBigCode is refused.

    With `fused` a fused model will do, too: its base is in it.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DsskError(f"no model at {path}: {str(error).splitlines()[0]}") from error
    if fused and isinstance(config, CrossAttnGPTBigCodeConfig) and not config.cross_attn_only:
        return config
    if type(config) is not GPTBigCodeConfig:
        raise DsskError(f"{path} is a {config.model_type} model, want gpt_bigcode (the StarCoder family)")
    return config


def load_base(
    path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> GPTBigCodeForCausalLM:
    """Load a base model frozen and in eval mode; `dtype="auto"` keeps the type its weights are stored in."""
    load_base_config(path, revision)
    try:
        model = GPTBigCodeForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True
        )
    except OSError as error:
        raise DsskError(f"cannot load the weights of {path}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(
    model: GPTBigCodeForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The base's last hidden states, after `ln_f` and before the LM head.

    `input_ids` and `attention_mask` are (B, S), padded on the right; returns (B, S, hidden_size). States at
    padding positions are meaningless: keep the mask.
    """
    return model.transformer(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def kv_cache_values(config: GPTBigCodeConfig) -> int:
    """Keys and values that a KV cache holds for each token, over all layers."""
    heads = 1 if config.multi_query else config.n_head
    return 2 * config.n_layer * heads * (config.n_embd // config.n_head)
