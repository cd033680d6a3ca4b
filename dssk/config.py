"""What to train: the keys of an experiment, their types, ranges and meanings. Values live in `exp_configs.py`."""

import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dssk.errors import DsskError
from dssk.utils.defaults import LARGEST, SEEDS
from dssk.utils.flags import nearest

MAX_FAULTS = 8  # that one message names
# Upper bounds: far above any real model, and low enough to compute with.
MAX_WIDTH, MAX_ROWS = 2**20, 2**12

Source = Literal["document", "neighbours", "random"]  # of distractors
TrainingSource = Literal[Source, "batch"]
MAX_KEY = 100  # letters of a key that are compared with the known ones
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100  # letters of a value that a message shows


class DecoderLora(BaseModel):
    """Low-rank adapters of the decoder's linear layers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rank: int = Field(ge=1, le=MAX_WIDTH, description="width of each adapter")
    alpha: float | None = Field(
        default=None, gt=0, description="what an adapter adds is times alpha / rank; None: twice the rank"
    )


class ExperimentConfig(BaseModel):
    """One experiment, complete and checked. It has no defaults: `BASE_CONFIG` in `exp_configs.py` is their home.

    Keys that came after version 0.1 have one: what 0.1 did, so that its experiments keep their identity.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )

    model_path: str = Field(
        min_length=1, description="base model, any decoder: a folder or a name on the Hub"
    )

    num_cross_attn_layers: int = Field(
        ge=1, description="cross-attention blocks, counted back from the output"
    )
    cross_attn_layers_stride: int = Field(
        ge=1, description="decoder layers from one block to the next below it"
    )
    cross_attn_shared_weights: bool = Field(description="one set of weights for all blocks")
    cross_attn_dropout_prob: float = Field(
        ge=0, lt=1, description="share of context tokens hidden in training"
    )
    cross_attn_final_layer: bool = Field(
        description="a block follows its decoder layer instead of preceding it"
    )
    cross_attn_shared_projections: bool = Field(description="queries and keys use one projection")
    cross_attn_hidden_size: int | None = Field(
        ge=1, le=MAX_WIDTH, description="width of the blocks; None: the decoder's"
    )
    cross_attn_num_attention_heads: int | None = Field(
        ge=1, le=MAX_WIDTH, description="heads; None: the decoder's"
    )
    cross_attn_num_key_value_heads: Annotated[int, Field(ge=1, le=MAX_WIDTH)] | Literal["base"] | None = (
        Field(description="key/value heads; None: all heads; base: grouped as the decoder's")
    )
    cross_attn_norm: Literal["layer_norm", "rms_norm", "base"] = Field(
        default="layer_norm", description="norms of a block; base: the decoder's kind"
    )
    cross_attn_mlp: Literal["plain", "gated", "base"] = Field(
        default="plain", description="MLP of a block; base: gated where the decoder's is"
    )
    cross_attn_init: Literal["zero", "normal", "copy", "overlap", "base"] = Field(
        description="zero: start as the base model exactly; copy: the last block starts as an induction head; "
        "overlap: as one that also looks for what shares words with the question, for several contexts; base: each "
        "block starts as its layer's self-attention, with keys and values fitted to the stored states"
    )

    reader: Literal["cross_attention", "merged"] = Field(
        default="cross_attention",
        description="what reads a context: blocks, or the base's own attention by maps from states to keys and values",
    )
    encode_layer: str | int | float | list[str | int | float] = Field(
        default="last",
        description="whose states are read: last, a layer, a share of the depth, or two with a +",
    )
    reader_rank: int | None = Field(
        default=None, ge=1, le=MAX_WIDTH, description="rank of a merged reader's maps; None: full"
    )
    reader_replay: int = Field(
        default=0,
        ge=0,
        le=LARGEST,
        description="layers from encode_layer on that a merged reader runs again on stored states: exact, at a cost",
    )
    decoder_lora: DecoderLora | None = Field(
        default=None,
        description='adapters of the decoder that act only while a context is read, {"rank": 16}; None: none',
    )

    context_size: int = Field(
        ge=8, le=LARGEST, description="most tokens of decoder text, and of a context's states"
    )
    num_contexts: int | list[int] = Field(
        default=1,
        description="contexts that a question reads, its own among them: a number, or [least, most]",
    )
    distractors: dict[TrainingSource, float] = Field(
        default={"random": 1.0},
        description="where the others come from, and how often: document (the question's), neighbours (by its words), "
        "random (any), batch (of its other questions, at no cost)",
    )
    gold_missing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of questions that read other contexts alone; their answer is 'Answer not in context.'",
    )
    contexts_warmup: int = Field(
        default=0, ge=0, description="epochs at the start in which each question reads its own context alone"
    )
    include_context_ids: bool = Field(description="also train on the contexts themselves as decoder text")
    do_repetition_augmentations: bool = Field(description="append 'repeat ...' tasks to questions")
    loss_on: Literal["all", "answer"] = Field(
        description="labels of a question row: its whole text or its answer"
    )
    train_on: Literal["questions", "documents", "both"] = Field(
        default="questions",
        description="questions with answers; documents: what follows the beginning of a context, its answers unused",
    )
    distill: bool | str = Field(
        default=False,
        description="learn what the base says that reads the text itself, on documents; a folder: what a tuned model, "
        "or LoRA adapters of the base, say there and in half of each answer's target",
    )
    encode_online: bool = Field(
        description="encode contexts in the training step instead of reading them from disk"
    )

    questions_per_context: int = Field(
        default=1,
        ge=1,
        description="rows of one context that go through the model together, which projects it once for them",
    )
    group_by_length: bool = Field(description="rows of about equal length make a step: less padding")
    train_batch_size: int = Field(ge=1, le=MAX_ROWS, description="rows per device and micro-batch")
    test_batch_size: int = Field(ge=1, le=MAX_ROWS, description="rows per device in evaluation")
    skip_steps: int = Field(ge=1, le=MAX_ROWS, description="micro-batches accumulated per optimizer step")

    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "reduce_lr_on_plateau"
    ] = Field(description="learning rate over the steps")
    warmup_ratio: float = Field(ge=0, lt=1, description="share of the steps in which the learning rate rises")
    adam_beta1: float = Field(ge=0, lt=1, description="decay of AdamW's first moment")
    adam_beta2: float = Field(ge=0, lt=1, description="decay of AdamW's second moment")
    adam_epsilon: float = Field(gt=0, description="AdamW's epsilon")
    adam_moments: Literal["bf16", "fp32"] = Field(
        description="precision that AdamW's moments are rounded to after each step"
    )
    weight_decay: float = Field(ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(gt=0, description="gradients are clipped to this norm")
    label_smoothing_factor: float = Field(
        ge=0, lt=1, description="probability mass spread over the vocabulary"
    )

    fp16: bool = Field(description="mixed precision in float16 (GPU only)")
    bf16: bool = Field(description="mixed precision in bfloat16")
    attn_implementation: Literal["eager", "sdpa"] | None = Field(
        default=None,
        description="attention in training: eager (written out; for bfloat16 on a CPU) or sdpa; None: as transformers "
        "chooses",
    )
    gradient_checkpointing: bool = Field(
        description="recompute activations in the backward pass: less memory"
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="evaluations in a row without a better one that end training; None: all --steps",
    )
    seed: int = Field(ge=0, lt=SEEDS, description="of new weights, sample order and augmentations")

    @property
    def contexts_range(self) -> tuple[int, int]:
        """The least and the most contexts that a question reads."""
        low, high = (
            self.num_contexts
            if isinstance(self.num_contexts, list)
            else (self.num_contexts, self.num_contexts)
        )
        return low, high

    @property
    def several_contexts(self) -> bool:
        """Whether questions read other contexts than their own."""
        return self.contexts_range != (1, 1) or self.gold_missing > 0

    @field_validator("num_contexts")
    @classmethod
    def _check_contexts(cls, value: int | list[int]) -> int | list[int]:
        ends = value if isinstance(value, list) else [value, value]
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise ValueError(f"{value} is neither a number from 1 nor [least, most] of such")
        return value

    @field_validator("distractors")
    @classmethod
    def _check_distractors(cls, value: dict[str, float]) -> dict[str, float]:
        if min(value.values(), default=-1.0) < 0 or not sum(value.values()):
            raise ValueError(f"{value} are no weights: want some above 0, and none below")
        return value


def merged_name(layer: Any, replay: int) -> str:
    """What a merged reader reads, for people."""
    return f"merged, from states of layer {layer}" + (f", {replay} layers of it run again" if replay else "")


def parse_experiment(exp_dict: dict[str, Any]) -> ExperimentConfig:
    """Check an experiment; every fault is named in one `DsskError`, an unknown key with the nearest known one."""
    try:
        cfg = ExperimentConfig.model_validate(exp_dict)
    except ValidationError as error:
        raise DsskError(f"experiment: {faults(error, ExperimentConfig.model_fields)}") from None
    if cfg.fp16 and cfg.bf16:
        raise DsskError("experiment: fp16 and bf16 are both true, want at most one of them")
    if cfg.reader == "merged" and cfg.gradient_checkpointing:
        raise DsskError(
            "experiment: gradient_checkpointing recomputes layers without their cache, where a merged reader reads: "
            "set it to false"
        )
    if cfg.decoder_lora and cfg.gradient_checkpointing:
        raise DsskError(
            "experiment: gradient_checkpointing recomputes layers without what they read, where adapters do not act: "
            "set it to false, or decoder_lora to null"
        )
    if cfg.train_batch_size % cfg.questions_per_context:
        raise DsskError(
            f"experiment: questions_per_context is {cfg.questions_per_context}, want a divisor of train_batch_size, "
            f"which is {cfg.train_batch_size}"
        )
    if cfg.distractors.get("batch") and cfg.train_batch_size <= cfg.questions_per_context:
        raise DsskError(
            f"experiment: distractors of the batch, and a train_batch_size of {cfg.train_batch_size} with "
            f"{cfg.questions_per_context} questions a context has one context: want random ones, or a larger batch"
        )
    if cfg.questions_per_context > 1 and cfg.include_context_ids:
        raise DsskError(
            "experiment: include_context_ids makes rows of the contexts themselves, which share none: set it to false, "
            "or questions_per_context to 1"
        )
    if cfg.distill is True and cfg.train_on == "questions":
        raise DsskError(
            "experiment: distill true learns from the base on documents, and train_on is questions: set train_on to "
            "documents or both, or distill to the folder of a tuned model"
        )
    if cfg.several_contexts and (cfg.distill or cfg.train_on != "questions"):
        raise DsskError(
            "experiment: distill and train_on read one context: set num_contexts to 1 and gold_missing to 0, or train "
            "on questions without a teacher"
        )
    if cfg.distill and cfg.label_smoothing_factor:
        raise DsskError("experiment: distill has soft labels already: set label_smoothing_factor to 0")
    return cfg


def faults(error: ValidationError, known: Iterable[str]) -> str:
    """The faults of a configuration, on one line; `known` are its valid keys."""
    found = error.errors(include_url=False)
    more = [f"and {len(found) - MAX_FAULTS} more"] if len(found) > MAX_FAULTS else []
    return "; ".join([*(_fault(fault, known) for fault in found[:MAX_FAULTS]), *more])


def _fault(fault: Any, known: Iterable[str]) -> str:
    whole = fault["type"] == "extra_forbidden"
    key = ".".join(
        str(part) for i, part in enumerate(fault["loc"]) if not i or whole or str(part).isidentifier()
    )
    shown = key if re.fullmatch(r"[\w.]{1,60}", key) else _short.repr(key)
    if fault["type"] == "extra_forbidden":
        return f"unknown key {shown}{nearest(key[:MAX_KEY], known)}"
    if fault["type"] == "missing":
        return f"key {shown} is missing"
    if fault["type"] == "value_error":
        return f"{shown}: {fault['ctx']['error']}"
    return f"{shown} is {_short.repr(fault['input'])}, {fault['msg'][0].lower()}{fault['msg'][1:]}"


def expand_group(experiments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every experiment of a group; a list as a value stands for one experiment with each of its elements."""
    expanded = []
    for experiment in experiments:
        choices = [value if isinstance(value, list) else [value] for value in experiment.values()]
        expanded += [dict(zip(experiment, choice, strict=True)) for choice in itertools.product(*choices)]
    return expanded


def experiment_id(exp_dict: dict[str, Any]) -> str:
    """The 32 hex digits that name an experiment's folder, the same as haven-ai gives it (`hash_dict`)."""
    values = {
        key: experiment_id(value) if isinstance(value, dict) else value for key, value in exp_dict.items()
    }
    text = "".join(f"{key}/{values[key]}" for key in sorted(values))
    try:
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    except UnicodeEncodeError as error:
        broken = text[max(0, error.start - 20) : error.end]
        raise DsskError(f"experiment: half a surrogate pair, which is no text, at {broken!r}") from None


def apply_overrides(exp_dict: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The experiment with `key=value` overrides; values are JSON (`1e-4`, `true`, `null`) or else plain text."""
    changed = dict(exp_dict)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise DsskError(f"--set {override}: want key=value")
        try:
            changed[key] = json.loads(text)
        except json.JSONDecodeError:
            changed[key] = text
        except (RecursionError, ValueError):
            raise DsskError(f"--set {key}: its value is nested too deeply, or a number too long") from None
    return changed
