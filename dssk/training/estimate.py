"""What a run will need, before anything is spent: `trainval.py --dry_run`. The model is built without its weights."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

from dssk.config import ExperimentConfig
from dssk.inference.loading import load_base_config
from dssk.models.configuration import CrossAttnConfig
from dssk.models.modeling import CrossAttnForCausalLM, is_cross_attn
from dssk.inference.rounding import encoding_bytes
from dssk.store.format import Manifest
from dssk.training.flags import RunArgs
from dssk.utils.files import size

FP32_BYTES = 4
MOMENTS = 2  # that AdamW keeps of each weight
# Values a decoder layer keeps for its backward pass, as multiples of the hidden size: two layer norms, query, key
# and value, attention's output, two projections, and twice the 4-fold hidden layer of the MLP.
KEPT_PER_LAYER = 16
RANKS_SHOWN = (1, 2, 4, 8)


@dataclass(frozen=True)
class Estimate:
    """Bytes by use, on one GPU that holds all of it."""

    frozen_parameters: int
    trained_parameters: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int  # on the disk: weights in fp32, and the moments as they are rounded

    def per_rank(self, engine: str, ranks: int) -> int:
        """Bytes on each of so many ranks."""
        whole = {"ddp": 1, "zero2": 1, "zero3": ranks}[engine]
        moments = {"ddp": 1, "zero2": ranks, "zero3": ranks}[engine]
        weights = (self.frozen + self.trained) // whole
        return weights + (self.gradients + self.optimizer) // moments + self.activations


def meta_model(cfg: ExperimentConfig) -> CrossAttnForCausalLM:
    """The model of an experiment with shapes and no values: seconds and no memory, whatever its size."""
    base = load_base_config(cfg.model_path)
    ours = {key: value for key, value in cfg.model_dump().items() if "cross_attn" in key}
    with torch.device("meta"):
        return family(base.model_type).causal_lm(fused_config(base, **ours))


def estimate(cfg: ExperimentConfig, model: CrossAttnForCausalLM) -> Estimate:
    """Weights, gradients and moments exactly; activations roughly."""
    trained = sum(p.numel() for n, p in model.named_parameters() if is_cross_attn(n))
    frozen = sum(p.numel() for n, p in model.named_parameters() if not is_cross_attn(n))
    item = 2 if cfg.fp16 or cfg.bf16 else FP32_BYTES
    return Estimate(
        frozen_parameters=frozen,
        trained_parameters=trained,
        frozen=frozen * item,
        trained=trained * FP32_BYTES,
        gradients=trained * FP32_BYTES,
        optimizer=MOMENTS * trained * FP32_BYTES,
        activations=_activations(cfg, model.config) * item,
        checkpoint=trained * checkpoint_bytes(cfg),
    )


def checkpoint_bytes(cfg: ExperimentConfig) -> int:
    """Bytes that one trained parameter takes in a checkpoint."""
    return FP32_BYTES + MOMENTS * (2 if cfg.adam_moments == "bf16" else FP32_BYTES)


def _activations(cfg: ExperimentConfig, config: CrossAttnConfig) -> int:
    """Values kept for the backward pass of one micro-batch of the longest rows."""
    tokens = cfg.train_batch_size * cfg.context_size
    hidden, width = config.n_embd, config.cross_attn_hidden_size or config.n_embd
    layers = config.n_layer - min(config.cross_attn_layers)  # below there is nothing to differentiate
    blocks = len(config.cross_attn_layers)
    layer = KEPT_PER_LAYER * hidden
    block = KEPT_PER_LAYER * width + 2 * width  # its own, and keys and values of the context
    kept = (
        hidden * (layers + blocks) + layer + block
        if cfg.gradient_checkpointing
        else layers * layer + blocks * block
    )
    return tokens * kept


def report(cfg: ExperimentConfig, run: RunArgs, exp_dict: dict[str, Any], data: Manifest) -> str:
    """All that `--dry_run` prints."""
    model = meta_model(cfg)
    need = estimate(cfg, model)
    config = model.config
    total = need.frozen_parameters + need.trained_parameters
    side = "after" if config.cross_attn_final_layer else "before"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    stored = 0 if data.storage_dtype is None else encoding_bytes(data.storage_dtype, data.hidden_size)
    rows = cfg.train_batch_size * cfg.skip_steps * ranks
    kept = run.save_total_limit + 1
    lines = [
        json.dumps(exp_dict, indent=2),
        f"base         {config.n_layer} layers x {config.n_embd}, {config.n_head} heads, {need.frozen_parameters:,} "
        "parameters, frozen",
        f"blocks       {side} decoder layers {', '.join(map(str, config.cross_attn_layers))}; "
        f"{need.trained_parameters:,} parameters, trained ({need.trained_parameters / total:.2%})",
        f"step         {cfg.train_batch_size} rows x {cfg.skip_steps} accumulated x {ranks} ranks = {rows} rows, "
        f"at most {rows * cfg.context_size:,} tokens; {run.steps:,} steps",
        f"weights      {size(need.frozen)} frozen, {size(need.trained)} trained",
        f"gradients    {size(need.gradients)}",
        f"optimizer    {size(need.optimizer)}",
        f"activations  about {size(need.activations)} for {cfg.train_batch_size} rows of {cfg.context_size} tokens",
        "memory of each rank, about:",
        f"  ranks         {''.join(f'{n:>12}' for n in RANKS_SHOWN)}",
        *(
            f"  {name:13} {''.join(f'{size(need.per_rank(engine, n)):>12}' for n in RANKS_SHOWN)}"
            for name, engine in (("torchrun", "ddp"), ("ZeRO-2", "zero2"), ("ZeRO-3, FSDP2", "zero3"))
        ),
        f"encodings    {size(stored * data.counts.tokens)} for {data.counts.contexts:,} contexts",
        f"checkpoints  {size(need.checkpoint)} each, {size(kept * need.checkpoint)} for {kept}",
        f"fused model  {size(need.frozen + need.trained)} each",
    ]
    return "\n".join(lines)
