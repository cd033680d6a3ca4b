"""Estimates of memory and disk for `trainval.py --dry_run`. The model is built without its weights."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from dssk.config import ExperimentConfig, merged_name
from dssk.inference.auto import family, fused_config
from dssk.inference.loading import load_base_config
from dssk.inference.rounding import encoding_bytes
from dssk.models.configuration import FIELDS, num_attention_heads
from dssk.models.loss import CHUNK_LOGITS
from dssk.models.shapes import kv_cache_values, mlp_values, projected_values
from dssk.store.manifest import Manifest
from dssk.training.flags import RunArgs
from dssk.utils.files import size

FP32_BYTES = 4
MOMENTS = 2  # that AdamW keeps of each weight
CACHE_BYTES = 2  # of a value of a KV cache, and of a projected context in 16 bits
# Values that a decoder layer keeps for its backward pass beside its MLP's hidden layer, as multiples of the hidden
# size: two norms, query, key and value, attention's output, two projections.
KEPT_PER_LAYER = 8
KEPT_OF_MLP = 2  # before and after the activation; what a gate adds is within the error
KEPT_OF_LOGITS = 3  # themselves, their probabilities, their gradient
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


def meta_model(cfg: ExperimentConfig, base: PreTrainedConfig) -> Any:
    """The model of an experiment with shapes and no values: seconds and no memory, whatever its size."""
    with torch.device("meta"):
        return family(base.model_type).causal_lm(fused_config(base, **model_fields(cfg)))


def model_fields(cfg: ExperimentConfig) -> dict[str, Any]:
    """The keys of an experiment that describe the model; its configuration has the same names for them."""
    return {key: value for key, value in cfg.model_dump().items() if key in FIELDS}


def estimate(cfg: ExperimentConfig, model: Any) -> Estimate:
    """Weights, gradients and moments exactly; activations roughly."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    item = 2 if cfg.fp16 or cfg.bf16 else FP32_BYTES
    return Estimate(
        frozen_parameters=frozen,
        trained_parameters=trained,
        frozen=frozen * item,
        trained=trained * FP32_BYTES,
        gradients=trained * FP32_BYTES,
        optimizer=MOMENTS * trained * FP32_BYTES,
        activations=_activations(cfg, model.config) * item + _logits(cfg, model.config) * FP32_BYTES,
        checkpoint=trained * checkpoint_bytes(cfg),
    )


def checkpoint_bytes(cfg: ExperimentConfig) -> int:
    """Bytes that one trained parameter takes in a checkpoint."""
    return FP32_BYTES + MOMENTS * (2 if cfg.adam_moments == "bf16" else FP32_BYTES)


def _activations(cfg: ExperimentConfig, config: Any) -> int:
    """Values kept for the backward pass of one micro-batch of the longest rows."""
    tokens = cfg.train_batch_size * cfg.context_size
    hidden, width = config.hidden_size, config.cross_attn_hidden_size
    layers = config.num_hidden_layers - config.reading_layers[0]  # below there is nothing to differentiate
    blocks = 0 if config.reader == "merged" else len(config.cross_attn_layers)
    layer = KEPT_PER_LAYER * hidden + KEPT_OF_MLP * mlp_values(config)
    block = (
        KEPT_PER_LAYER + KEPT_OF_MLP * 4
    ) * width + 2 * width  # its own, and keys and values of the context
    kept = (
        hidden * (layers + blocks) + layer + block
        if cfg.gradient_checkpointing
        else layers * layer + blocks * block
    )
    # Adapters of layers that are run again have the contexts' activations behind them.
    again = config.reader_replay * layer if config.decoder_lora else 0
    contexts = cfg.contexts_range[1] * -(-cfg.train_batch_size // cfg.questions_per_context)
    return tokens * kept + contexts * cfg.context_size * again


def _logits(cfg: ExperimentConfig, config: Any) -> int:
    """Values of the logits that exist at a time, and of what is made of them."""
    return KEPT_OF_LOGITS * min(CHUNK_LOGITS, cfg.train_batch_size * cfg.context_size * config.vocab_size)


def report(cfg: ExperimentConfig, run: RunArgs, exp_dict: dict[str, Any], data: Manifest) -> str:
    """All that `--dry_run` prints."""
    model = meta_model(cfg, load_base_config(cfg.model_path))
    need = estimate(cfg, model)
    config = model.config
    total = need.frozen_parameters + need.trained_parameters
    side = "after" if config.cross_attn_final_layer else "before"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    stored = 0 if data.storage_dtype is None else encoding_bytes(data.storage_dtype, data.hidden_size)
    cached, projected = (
        CACHE_BYTES * values for values in (kv_cache_values(config), projected_values(config))
    )
    rows = cfg.train_batch_size * cfg.skip_steps * ranks
    kept = run.save_total_limit + 1
    lines = [
        json.dumps(exp_dict, indent=2),
        f"base         {config.num_hidden_layers} layers x {config.hidden_size}, {num_attention_heads(config)} heads, "
        f"{need.frozen_parameters:,} parameters, frozen",
        (
            f"reader       {merged_name(cfg.encode_layer, cfg.reader_replay)}; "
            if cfg.reader == "merged"
            else f"blocks       {side} decoder layers {', '.join(map(str, config.cross_attn_layers))}; "
        )
        + f"{need.trained_parameters:,} parameters, trained ({need.trained_parameters / total:.2%})",
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
        f"a token      {stored:,} bytes stored, {projected:,} projected; {cached:,} in the base's KV cache",
        f"encodings    {size(stored * data.counts.tokens)} for {data.counts.contexts:,} contexts",
        f"checkpoints  {size(need.checkpoint)} each, {size(kept * need.checkpoint)} for {kept}",
        f"fused model  {size(need.frozen + need.trained)} each",
    ]
    return "\n".join(lines)
