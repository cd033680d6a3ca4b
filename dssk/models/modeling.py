"""A decoder of any family that reads cached contexts: a frozen base, and cross-attention blocks placed into it.

What is unusual here:
- No class is written for a family. Mixins are put before the family's own classes (`dssk.inference.auto` does it),
  and before those of its layers when a model is made: names, forward passes and everything else stay the base's.
- The base's weights keep their names, so any checkpoint of the family loads; all new ones live under `cross_attn.`
  of the backbone (adapters of the decoder under `decoder_lora.`), once each, however many decoder layers use them.
- A context is projected to keys and values once (`project_context`) and then shared by all tokens, beams and
  questions. With shared weights one projection also serves every layer.
- Without a context the blocks are skipped: the model *is* its base, bit for bit.

Shapes as in `cross_attention.py`: B decoder rows, T decoder tokens, C contexts, S context tokens, d hidden size.
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput, cached_file
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from dssk.models.configuration import FIELDS, CrossAttnConfig, base_values
from dssk.models.cross_attention import (
    CrossAttnBlock,
    CrossAttnLinear,
    CrossAttnOutput,
    ProjectedContext,
)
from dssk.models.decoder_lora import Adapter, place_adapters
from dssk.models.layers import CallVariable, Mixed, Reading, encode_states, extend, find_layers, reading
from dssk.models.loss import next_token_loss, shifted
from dssk.models.merged import ContextCache, MergedContext, MergedLinear, MergedReader, arguments

WEIGHTS_FILE = "model.safetensors"
CONTEXT_ARGUMENTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "context_input_ids",
    "context_attention_mask",
    "context",
)
NO_SPLIT = ("CrossAttnBlock", "CrossAttention")  # called apart: a context is projected outside the layers
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


Context = ProjectedContext | MergedContext  # what `project_context` gives, by the reader


def is_cross_attn(name: str) -> bool:
    """Whether a parameter belongs to the reader or its adapters: these are trained, saved apart and counted."""
    return "cross_attn." in name or "decoder_lora." in name


# --- how a context reaches the layers -------------------------------------------------------------------------


_headed = CallVariable("dssk_headed")  # last hidden states for which only the LM head is to be computed


class ReadingLayer(Mixed):
    """Mixed into each decoder layer: one that carries a block lets it read the context, before or after itself."""

    cross_attn_index: int | None = None  # which set of block weights; None for a layer without a block
    cross_attn_final: bool = False
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = reading.get()
        if now is None or now.context is None or self.cross_attn_index is None:
            return super().__call__(*args, **kwargs)
        blocks, context, _ = now
        index = self.cross_attn_index
        # The block is looked up at each call, as other libraries replace modules; it checkpoints itself.
        read = functools.partial(
            _read, blocks[index], keys=context.keys[index], values=context.values[index], mask=context.mask
        )
        if self.cross_attn_final:
            output = super().__call__(*args, **kwargs)
            return (read(output[0]), *output[1:]) if isinstance(output, tuple) else read(output)
        if args:
            args = (read(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = read(kwargs["hidden_states"])
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A layer above a block has its flag set, for gradient checkpointing looks at it; some families also look at
        # it to drop out activations, and the base is frozen.
        if not self.training:
            return super().forward(*args, **kwargs)
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = True


def _read(block: CrossAttnBlock, hidden_states: torch.Tensor, keys, values, mask) -> torch.Tensor:
    # Positional: reentrant checkpointing tracks gradients of positional arguments alone.
    return block(hidden_states, keys, values, mask)


class SkippedStack(Mixed):
    """Mixed into the module that runs the layers: hands on states that are ready when only the LM head is wanted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ready = _headed.get()
        return super().forward(*args, **kwargs) if ready is None else _Ready(last_hidden_state=ready)


class _Ready(BaseModelOutputWithPast):
    """What a backbone would return; whatever else a family's LM head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def declare(forward: Callable, base: Callable, extra: tuple[str, ...]) -> Callable:
    """`forward` with the documentation and the parameters of `base`, and `extra` ones on top.

    Libraries look at a model's signature: transformers' generation and `Trainer`, peft, export.
    """

    @functools.wraps(base)
    def declared(self, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    parameters = list(inspect.signature(base).parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in named}
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in extra if n not in known
    ]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    declared.__signature__ = inspect.Signature([*named, *added, rest])  # type: ignore[attr-defined]
    return declared


# --- the models ------------------------------------------------------------------------------------------------


# Mixins, which know what they are mixed into only as far as types go.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class CrossAttnPreTrainedModel(_Base):
    """What the backbone and the model with its LM head have in common; mixed in before a family's class."""

    config: Any
    _no_split_modules: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # weights are converted and initialized as the base's

    @property
    def cross_attn_blocks(self) -> Any:
        """The distinct sets of block weights, those of the highest layer first."""
        return self.base_model.cross_attn

    @property
    def decoder_adapters(self) -> nn.ModuleDict | None:
        """Low-rank adapters of the decoder, which act while a context is read; None without `decoder_lora`."""
        return self.base_model.decoder_lora

    @property
    def trained_modules(self) -> list[nn.Module]:
        """All that is not the base's: what reads, and the decoder's adapters."""
        return [module for module in (self.cross_attn_blocks, self.decoder_adapters) if module is not None]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Adapter):
            init.kaiming_uniform_(module.down, a=5**0.5)  # as peft does
            init.zeros_(module.up)
            return
        if isinstance(module, MergedReader):
            init.zeros_(module.shift)
            init.ones_(module.scale)
            init.copy_(module.rows, module.last_rows())
            return
        if isinstance(module, MergedLinear):
            init.zeros_(module.weight)  # `dssk.inference.calibrate` fits them
        elif isinstance(module, CrossAttnOutput) and self.config.cross_attn_init != "normal":
            init.zeros_(module.weight)
        elif isinstance(module, CrossAttnLinear):
            std = getattr(self.config, "initializer_range", None) or 0.02
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.RMSNorm):  # of a block: a base's are classes of their family
            init.ones_(module.weight)
        else:
            super()._init_weights(module)
            return
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def freeze_base(self) -> None:
        """Leave gradients to the reader and its adapters alone."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_cross_attn(name))

    def train(self, mode: bool = True):
        """Only the cross-attention blocks are ever in train mode; the base stays in eval (no dropout)."""
        super().train(False)
        backbone: Any = self.base_model
        self.training = backbone.training = mode
        for module in self.trained_modules:
            module.train(mode)
        if self.config.reader == "merged" or self.config.decoder_lora:
            return self  # gradient checkpointing would take away what is read: the cache, or the adapters' context
        # Gradient checkpointing looks at a layer's own flag. Below the lowest block there is nothing to differentiate.
        for layer in backbone.decoder_layers()[min(self.config.cross_attn_layers) :]:
            layer.training = mode
        return self

    def project_context(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> Context:
        """Project encoder states (C, S, d) to what is attended to, once for all tokens and questions.

        `encoder_attention_mask` (C, S), nonzero = attend. In training, `cross_attn_dropout_prob` of the tokens are
        hidden here, never all of a context's. States of several layers are (C, S, d x layers).
        """
        states = encoder_hidden_states
        if not isinstance(states, torch.Tensor) or states.ndim != 3:
            raise ValueError(
                f"encoder_hidden_states are {_described(states)}, want (contexts, tokens, hidden size)"
            )
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask is {tuple(mask.shape)}, want {tuple(states.shape[:2])} as the states"
            )
        tokens = mask
        if self.training and self.config.cross_attn_dropout_prob > 0:
            if tokens is None:
                tokens = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            mask = hide_tokens(tokens, self.config.cross_attn_dropout_prob)
        if self.config.reader == "merged":
            hidden = None if tokens is None or mask is None else tokens & ~mask
            return reading.during(None, self.cross_attn_blocks[0], self.base_model, states, tokens, hidden)
        keys, values = zip(*(block.attn(states) for block in self.cross_attn_blocks), strict=True)
        return ProjectedContext(keys, values, None if mask is None else mask.to(keys[0].device))

    @torch.no_grad()
    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode contexts (C, S) with the base: its states at `encode_layer` (C, S, d), and their boolean mask (C, S).

        Nothing above that layer is computed. Padding may stand on either side, the states of a context are the same.
        """
        return reading.during(
            None, encode_states, self.base_model, input_ids, attention_mask, self.config.encode_layers
        )

    def _take_context(self, kwargs: dict[str, Any]) -> Context | None:
        """Remove the arguments that give a context, of which there may be one kind, and project what they give."""
        states, mask, ids, ids_mask, context = (kwargs.pop(name, None) for name in CONTEXT_ARGUMENTS)
        given = {"encoder_hidden_states": states, "context_input_ids": ids, "context": context}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"got {' and '.join(names)}, want one of them")
        if ids is not None:
            states, mask = self.encode(ids, ids_mask)
        if states is not None:
            return self.project_context(states, mask)
        if context is not None:
            wanted = MergedContext if self.config.reader == "merged" else ProjectedContext
            if not isinstance(context, wanted):
                raise ValueError(
                    f"context is {_described(context)}, want what project_context of this model returns"
                )
            blocks = len(self.cross_attn_blocks)
            if isinstance(context, ProjectedContext) and len(context.keys) != blocks:
                raise ValueError(
                    f"the context was projected for {len(context.keys)} blocks, this model has {blocks}: project anew"
                )
        return context

    def _merge(self, context: MergedContext, kwargs: dict[str, Any], args: tuple = ()) -> dict[str, Any]:
        """Arguments of a forward pass on a text that follows a context in the cache."""
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "got a merged context and past_key_values, which it is to begin: want one of them"
            )
        text = args[0] if args else kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        return kwargs | arguments(self, context, kwargs.get("attention_mask"), *text.shape[:2])

    def _reads(self, context: Context | None, kwargs: dict[str, Any]) -> Reading | None:
        """What is to be read; what is read already stays, if it was projected by this model."""
        blocks = self.cross_attn_blocks
        if isinstance(context, MergedContext) or isinstance(kwargs.get("past_key_values"), ContextCache):
            return Reading(blocks, None, self.decoder_adapters)
        if context is not None:
            return Reading(blocks, context, self.decoder_adapters)
        now = reading.get()
        return now if now is not None and now.blocks is blocks else None

    def _read_during(self, call: Callable, context: Context | None, *args: Any, **kwargs: Any) -> Any:
        """What `call`, a forward pass, returns while the layers read; with the blocks' attention if asked for."""
        now = self._reads(context, kwargs)
        if isinstance(context, MergedContext):
            kwargs = self._merge(context, kwargs, args)
        wanted = kwargs.get("output_attentions")
        wanted = getattr(self.config, "output_attentions", False) if wanted is None else wanted
        if now is None or now.context is None or not wanted:
            return reading.during(now, call, *args, **kwargs)
        with _Attentions([block.attn for block in self.cross_attn_blocks]) as weights:
            output = reading.during(now, call, *args, **kwargs)
        if weights and isinstance(output, ModelOutput):
            output["cross_attentions"] = tuple(weights)
        return output


class _Attentions:
    """Collects the weights that modules attend with inside a block, in the order of the calls: lowest layer first."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __enter__(self) -> list[torch.Tensor]:
        self.weights: list[torch.Tensor] = []
        self.hooks = [module.register_forward_hook(self._note) for module in self.modules]
        return self.weights

    def _note(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        if len(args) > 1 and output[1] is not None:  # one argument alone: a context was projected
            self.weights.append(output[1])

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()


class CrossAttnModel(CrossAttnPreTrainedModel):
    """A backbone, without LM head, with its blocks. Mixed in before a family's class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.place_blocks()
        self.post_init()
        self.freeze_base()

    def place_blocks(self) -> None:
        """Make the blocks, and the layers read them."""
        stack, decoder_layers = find_layers(self, self.config.num_hidden_layers)
        if stack is not self:
            extend(stack, SkippedStack)
        _CAN_RECORD_REGISTRY[self] = self._can_record_outputs
        lora = self.config.decoder_lora
        self.decoder_lora = None if lora is None else place_adapters(decoder_layers, **lora)
        if self.config.reader == "merged":
            self._no_split_modules = _without_blocks(self._no_split_modules)
            states = len(self.config.encode_layers)
            self.cross_attn = nn.ModuleList([MergedReader(self, states, self.config.reader_rank)])
            return
        layers = self.config.cross_attn_layers
        distinct = 1 if self.config.cross_attn_shared_weights else len(layers)
        self.cross_attn = nn.ModuleList(CrossAttnBlock(self.config) for _ in range(distinct))
        for plain in decoder_layers:
            extend(plain, ReadingLayer)
        for number, layer_idx in enumerate(layers):
            layer: Any = decoder_layers[layer_idx]
            layer.cross_attn_index = number % distinct
            layer.cross_attn_final = self.config.cross_attn_final_layer

    def decoder_layers(self) -> nn.ModuleList:
        """The base's layers, lowest first."""
        return find_layers(self, self.config.num_hidden_layers)[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's, with at most one kind of context (see `CrossAttnForCausalLM.forward`)."""
        ready = _headed.get()
        if ready is not None:
            return _Ready(last_hidden_state=ready)
        return self._read_during(super().forward, self._take_context(kwargs), *args, **kwargs)


class CrossAttnForCausalLM(CrossAttnPreTrainedModel):
    """A frozen language model that answers from cached contexts. Mixed in before a family's class.

    >>> model = dssk.from_base("bigcode/starcoderbase-1b", num_cross_attn_layers=6)
    >>> states, mask = model.encode(**tokenizer(["context: ..."], return_tensors="pt"))
    >>> context = model.project_context(states, mask)
    >>> model.generate(**tokenizer(["question: ... \\n answer:"], return_tensors="pt"), context=context)
    """

    backbone_class: type[CrossAttnModel]  # of the same family
    forward_parameters: tuple[str, ...]  # of the base, in its order

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        backbone: Any = self.base_model
        backbone.__class__ = self.backbone_class
        backbone.place_blocks()
        backbone.post_init()
        if config.reader == "merged":
            self._no_split_modules = _without_blocks(self._no_split_modules)
        self.post_init()
        self.freeze_base()

    @classmethod
    def from_base(cls, base: str | os.PathLike, revision: str | None = None, **kwargs: Any):
        """Place new cross-attention blocks into the model at `base`, a folder or a name on the Hub.

        `kwargs` are the fields of `CrossAttnConfig`; any other goes to `from_pretrained` (`dtype`, `device_map`,
        ...). Raises `ValueError` for an impossible layout or a base of another kind.
        """
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        config_class: Any = cls.config_class
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        values, _ = config_class.get_config_dict(base, revision=revision, **hub)
        if values.get("model_type") != config_class.model_type:
            raise ValueError(f"{base} is a {values.get('model_type')} model, want {config_class.model_type}")
        named = {
            "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else str(base),
            "base_model_revision": revision,
        }
        config = config_class(**{**base_values(values), **named, **ours})
        return cls._load_base(base, config, revision=revision, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any
    ):
        """Load a fused model, or cross-attention weights alone together with the base model they name.

        `base_model` (a folder or a Hub name) overrides where the base is looked for.
        """
        path, base = pretrained_model_name_or_path, kwargs.pop("base_model", None)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, CrossAttnConfig):
            # As transformers does: what is a field of the configuration changes it, the rest is for the model, and
            # so is the dtype, which may be "auto".
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                path if config is None else config, return_unused_kwargs=True, **{**hub, **kwargs}
            )
            kwargs |= hub | dtype
        load = super().from_pretrained
        if config.cross_attn_only:
            weights = _load_weights(path, kwargs.pop("variant", None), **hub)
            for name in hub:
                if name not in ("token", "cache_dir", "local_files_only"):
                    kwargs.pop(name)
            base = base or config.base_model_name_or_path
            with_info = kwargs.pop("output_loading_info", False)
            model = cls._load_base(base, config, revision=config.base_model_revision, **kwargs)
            model.load_cross_attention(weights)
            info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
            return (model, {**info, "error_msgs": []}) if with_info else model
        with_info = kwargs.pop("output_loading_info", False)
        model, info = load(path, *args, config=config, output_loading_info=True, **kwargs)
        if missing := sorted(name for name in info["missing_keys"] if is_cross_attn(name)):
            raise ValueError(f"{path} has no weights for {missing[0]} and {len(missing) - 1} more")
        model.freeze_base()
        return (model, info) if with_info else model

    @classmethod
    def _load_base(cls, base: str | os.PathLike, config: CrossAttnConfig, **kwargs: Any):
        """Base weights under their own names; exactly the cross-attention weights are new."""
        with quiet_load_report():  # checked below, more strictly
            model, info = super().from_pretrained(base, config=config, output_loading_info=True, **kwargs)
        expected = {name for name in model.state_dict() if is_cross_attn(name)}
        tied = set(model.all_tied_weights_keys)
        if strange := ((set(info["missing_keys"]) - tied) ^ expected) | set(info["unexpected_keys"]):
            raise ValueError(
                f"{base} is not a plain {config.model_type} checkpoint: "
                f"{len(strange)} keys, {sorted(strange)[0]}"
            )
        model.freeze_base()
        if config.reader == "merged":
            model.cross_attn_blocks[0].find_rows(model.base_model)
        return model

    def load_cross_attention(self, weights: dict[str, torch.Tensor]) -> None:
        """Load cross-attention weights, exactly those this model has; raises `ValueError` for any other set."""
        own = {name: tensor for name, tensor in self.state_dict().items() if is_cross_attn(name)}
        wrong = [n for n in own.keys() | weights.keys() if n not in own or n not in weights]
        wrong += [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
        if wrong:
            raise ValueError(
                f"cross-attention weights of another architecture: {len(wrong)} differ, {sorted(wrong)[0]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def save_pretrained(
        self, save_directory, *args: Any, cross_attn_only: bool = False, **kwargs: Any
    ) -> None:
        """Save the fused model, or with `cross_attn_only` the new weights and the name of their base: megabytes."""
        if cross_attn_only:
            if self.config.base_model_name_or_path is None:
                raise ValueError(
                    "this model names no base to place its blocks into, or its embeddings were resized: save it whole"
                )
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {name: t for name, t in state_dict.items() if is_cross_attn(name)}
            kwargs["save_original_format"] = False  # the names of a family's published weights are not ours
        was, self.config.cross_attn_only = self.config.cross_attn_only, cross_attn_only
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.cross_attn_only = was

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of the base alone, under its names."""
        return {name: tensor for name, tensor in self.state_dict().items() if not is_cross_attn(name)}

    def plain_base(self) -> PreTrainedModel:
        """A plain model of the base's family that shares its weights with this one."""
        plain_class: Any = next(
            c
            for c in type(self).__mro__
            if issubclass(c, PreTrainedModel) and not issubclass(c, CrossAttnPreTrainedModel)
        )
        with torch.device("meta"):
            plain = plain_class(plain_class.config_class(**self.config.base_dict()))
        plain.load_state_dict(self.base_state_dict(), assign=True)
        plain.tie_weights()
        for (
            name,
            module,
        ) in plain.named_modules():  # what is no weight, such as the frequencies of rotary positions
            module._buffers.update(self.get_submodule(name)._buffers)
        plain.generation_config = self.generation_config
        return plain

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.base_model_name_or_path = None  # its embeddings are others now
        self.freeze_base()
        return embeddings

    def trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are in all."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """As the base's `forward` on `input_ids` (B, T), with at most one kind of context; without any, it is the base.

        Args:
            encoder_hidden_states: (C, S, d) as `encode` gives them; B is a multiple of C, and the rows that
                share a context lie together.
            encoder_attention_mask: (C, S), nonzero = attend.
            context_input_ids: (C, S) tokens, encoded here; `context_attention_mask` is theirs.
            context: a context that was projected ahead of time.
            labels: (B, T), -100 = ignored. They are shifted here, as in all of transformers; `shift_labels` (B, T)
                are what each position is to predict already.
            num_items_in_batch: divisor of the summed loss; the labels of this batch if not given.
            smoothing: probability mass that the loss spreads over the vocabulary.
            skip_logits: with labels, return no logits and never compute those of unlabelled positions;
                the default in train mode.
        """
        kwargs |= dict(zip(self.forward_parameters, args, strict=False))
        labels = kwargs.pop("labels", labels)
        targets = kwargs.pop("shift_labels", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        context = self._take_context(kwargs)
        if targets is None and labels is not None:
            targets = shifted(labels)
        if targets is None:
            return self._read_during(super().forward, context, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        kwargs.pop("logits_to_keep", None)
        if self.training:
            kwargs["use_cache"] = False
        backbone = self.base_model
        outputs = self._read_during(backbone, context, **kwargs, return_dict=True)
        hidden_states = outputs.last_hidden_state
        targets = targets.to(hidden_states.device)
        skip_logits = self.training if skip_logits is None else skip_logits
        logits = None if skip_logits else self._logits(hidden_states)
        states, head = (hidden_states, self._logits) if logits is None else (logits, _identity)
        vocabulary = self.config.get_text_config().vocab_size
        loss = next_token_loss(states, head, targets, vocabulary, num_items, smoothing)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            cross_attentions=getattr(outputs, "cross_attentions", None),
        )
        return output if as_dict else output.to_tuple()

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) of last hidden states (..., d), as the family's own forward pass makes them.

        Its head may have a bias, a soft cap or a scale, and may be wrapped: only its own code knows.
        """
        rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        logits = _headed.during(rows, super().forward, inputs_embeds=rows, use_cache=False).logits
        return logits.view(*hidden_states.shape[:-1], -1)

    def _generate_after(
        self, context: MergedContext, inputs: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of `generate` on texts that follow a context in the cache: an ordinary one, for every beam."""
        named = [kwargs.get("input_ids"), inputs, kwargs.get("inputs_embeds")]
        text = next((value for value in named if value is not None), None)
        if text is None:
            raise ValueError("got a context and nothing to go on from: want input_ids")
        settings = [kwargs.get("generation_config"), self.generation_config]
        copies = [
            kwargs.get(name) or next((v for s in settings if s and (v := getattr(s, name, None))), 1)
            for name in ("num_beams", "num_return_sequences")
        ]
        given = self._merge(context, {**kwargs, "input_ids": text if text.ndim == 2 else text[..., 0]})
        rows = text.shape[0] * max(copies)
        if rows > text.shape[0]:
            given["past_key_values"] = context.cache(self.config, rows)
        if inputs is not None or kwargs.get("inputs_embeds") is not None:
            given.pop("input_ids")
        return given

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any):
        """As in transformers, with a context: `encoder_hidden_states` and `encoder_attention_mask`,
        `context_input_ids` and `context_attention_mask`, or `context` from `project_context`.

        It is read and projected once, and not repeated for beams or returned sequences.
        """
        context = self._take_context(kwargs)
        if isinstance(context, MergedContext):
            return super().generate(inputs, *args, **self._generate_after(context, inputs, kwargs))
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not isinstance(assistant, CrossAttnForCausalLM):
            # As an argument it would reach the assistant, too.
            return reading.during(self._reads(context, kwargs), super().generate, inputs, *args, **kwargs)
        if context is not None:
            kwargs["context"] = context
        return super().generate(inputs, *args, **kwargs)


def _without_blocks(names: Any) -> list[str]:
    """Names of classes that are not split, for a model without blocks: sharding looks for each of them."""
    return [name for name in names or () if name not in NO_SPLIT]


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _described(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"a {type(value).__name__}"
    )


def hide_tokens(mask: torch.Tensor, prob: float) -> torch.Tensor:
    """Hide each visible token of a boolean mask (C, S) with probability `prob`, but never a row's last visible one.

    The token with the highest draw of its row always stays.
    """
    draws = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    return mask & ((draws >= prob) | (draws == draws.amax(-1, keepdim=True)))


def _load_weights(path: str | os.PathLike, variant: str | None, **hub: Any) -> dict[str, torch.Tensor]:
    """All safetensors weights of a folder or a Hub repository, in one file or in shards."""
    import json

    from safetensors.torch import load_file

    stem = "model" if variant is None else f"model.{variant}"
    found = cached_file(path, f"{stem}.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if found is not None:
        return load_file(found)
    index = cached_file(
        path, f"model.safetensors.index{'' if variant is None else '.' + variant}.json", **hub
    )
    shards = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
    return {n: t for shard in shards for n, t in load_file(cached_file(path, shard, **hub)).items()}


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Silence transformers' report on missing weights; its level is left alone, other checks look at it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


# --- classes of a family ---------------------------------------------------------------------------------------


def family_classes(
    config_class: Any, backbone_class: Any, causal_class: Any, *more: Any
) -> tuple[type, type, type]:
    """The fused configuration, backbone and causal language model of a family; `more` is mixed into the last."""
    fields = {name: getattr(CrossAttnConfig, name) for name in FIELDS}
    config = type(
        f"CrossAttn{config_class.__name__}",
        (CrossAttnConfig, config_class),
        {
            "__annotations__": CrossAttnConfig.__annotations__,
            "__doc__": CrossAttnConfig.__doc__,
            "attribute_map": {
                **config_class.attribute_map,
                "n_cross_attn_layers": "num_cross_attn_layers",  # the published original's name
            },
            **fields,
        },
    )
    shared = {"config_class": config}
    backbone = type(
        f"CrossAttn{backbone_class.__name__}",
        (CrossAttnModel, backbone_class),
        {
            **shared,
            "forward": declare(CrossAttnModel.forward, backbone_class.forward, CONTEXT_ARGUMENTS),
            "_no_split_modules": [*(backbone_class._no_split_modules or []), *NO_SPLIT],
        },
    )
    parameters = inspect.signature(causal_class.forward).parameters
    causal = type(
        f"CrossAttn{causal_class.__name__}",
        (*more, CrossAttnForCausalLM, causal_class),
        {
            **shared,
            "backbone_class": backbone,
            "forward_parameters": tuple(parameters)[1:],
            "forward": declare(CrossAttnForCausalLM.forward, causal_class.forward, CONTEXT_ARGUMENTS),
            "_no_split_modules": [*(causal_class._no_split_modules or []), *NO_SPLIT],
        },
    )
    return config, backbone, causal
