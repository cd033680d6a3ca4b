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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from dssk.models.cross_attention import (
    CrossAttention,
    CrossAttnBlock,
    CrossAttnLinear,
    CrossAttnOutput,
    ProjectedContext,
)
from dssk.models.decoder_lora import Adapter, place_adapters
from dssk.models.layers import encode_states, extend, find_layers
from dssk.models.loss import SoftTargets, next_token_loss, shifted
from dssk.models.merged import (
    ContextCache,
    MergedContext,
    MergedLinear,
    MergedReader,
    arguments,
    read_context,
)
from dssk.models.packing import Packing
from dssk.models.reading import (
    Attentions,
    PrecomputedOutput,
    Reading,
    ReadingLayer,
    SkippableStack,
    head_only,
    hide_tokens,
    reading,
)
from dssk.models.weights import FusedWeights, is_cross_attn

CONTEXT_ARGUMENTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "context_input_ids",
    "context_attention_mask",
    "context",
    "context_lengths",
    "context_groups",
)
NO_SPLIT = ("CrossAttnBlock", "CrossAttention")  # called apart: a context is projected outside the layers
Context = ProjectedContext | MergedContext  # what `project_context` gives, by the reader


# For type checkers, a mixin derives from the class that it is mixed into.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class CrossAttnPreTrainedModel(_Base):
    """Common part of the backbone and of the model with its LM head; mixed in before a family's class."""

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
        if isinstance(module, CrossAttention):
            if module.standardizes:
                init.zeros_(module.shift)
                init.ones_(module.scale)
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
        """Require gradients of the reader and the adapters only."""
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
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        context_lengths: torch.Tensor | None = None,
        context_groups: torch.Tensor | None = None,
    ) -> Context:
        """Project encoder states (C, S, d) to what is attended to, once for all tokens and questions.

        `encoder_attention_mask` (C, S), nonzero = attend. In training, `cross_attn_dropout_prob` of the tokens are
        hidden here, never all of a context's. States of several layers are (C, S, d x layers).

        With `context_lengths` (C,) the states are (1, N, d): those of C contexts one behind the other. The rows of
        `context_groups` (B, M) are then what B decoder rows read: each the contexts with these numbers, and no more
        at -1. They are read together and in no order.
        """
        states = encoder_hidden_states
        if not isinstance(states, torch.Tensor) or states.ndim != 3:
            raise ValueError(
                f"encoder_hidden_states are {_described(states)}, want (contexts, tokens, hidden size)"
            )
        if context_lengths is not None:
            return self._project_packed(states, Packing(context_lengths, context_groups))
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
            return self._merged(states, tokens, hidden)
        if mask is not None and not self.training and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # attention without a mask takes the faster kernels
        keys, values = zip(*(block.attn(states) for block in self.cross_attn_blocks), strict=True)
        return ProjectedContext(keys, values, None if mask is None else mask.to(keys[0].device))

    def _project_packed(self, states: torch.Tensor, packing: Packing) -> Context:
        """The same for packed states (1, N, d)."""
        if states.shape[:2] != (1, int(packing.lengths.sum())):
            raise ValueError(
                f"encoder_hidden_states are {_described(states)}, want (1, {int(packing.lengths.sum())}, hidden size) "
                "as context_lengths say"
            )
        tokens, visible = packing.tokens_of_rows()
        mask = visible
        if self.training and self.config.cross_attn_dropout_prob > 0:
            mask = hide_tokens(visible, self.config.cross_attn_dropout_prob)
        if self.config.reader == "merged":
            if self.config.reader_replay:  # layers that are run again attend, each context to itself
                whole = self._merged(*packing.padded(states)).packed()
            else:
                whole = self._merged(states, positions=packing.positions()[None])
            return whole.gathered(tokens, mask, packing.row_lengths().amax(1))
        keys, values = zip(*(block.attn(states) for block in self.cross_attn_blocks), strict=True)
        return ProjectedContext(keys, values, None).gathered(tokens, mask)

    def _merged(self, *args: Any, **kwargs: Any) -> MergedContext:
        """What a merged reader makes of states. Layers that it runs again are part of reading: their adapters act."""
        blocks = self.cross_attn_blocks
        now = Reading(blocks, None, self.decoder_adapters) if self.config.reader_replay else None
        return reading.during(now, read_context, blocks[0], self.base_model, *args, **kwargs)

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
        """Pop the arguments that give a context, at most one kind of them, and return it projected."""
        states, mask, ids, ids_mask, context, lengths, groups = (
            kwargs.pop(name, None) for name in CONTEXT_ARGUMENTS
        )
        given = {"encoder_hidden_states": states, "context_input_ids": ids, "context": context}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"got {' and '.join(names)}, want one of them")
        if ids is not None:
            states, mask = self.encode(ids, ids_mask)
            if groups is not None:
                states, lengths = states[mask][None], mask.sum(-1)
        if states is not None:
            return self.project_context(states, mask, lengths, groups)
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
        """`kwargs` of a forward pass on a text after a context, with the context's cache, mask and positions."""
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "got a merged context and past_key_values, which it is to begin: want one of them"
            )
        text = args[0] if args else kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        return kwargs | arguments(self, context, kwargs.get("attention_mask"), *text.shape[:2])

    def _reads(self, context: Context | None, kwargs: dict[str, Any]) -> Reading | None:
        """What the layers read during this call: the given context, or that of an outer call of this model."""
        blocks = self.cross_attn_blocks
        if isinstance(context, MergedContext) or isinstance(kwargs.get("past_key_values"), ContextCache):
            return Reading(blocks, None, self.decoder_adapters)
        if context is not None:
            return Reading(blocks, context, self.decoder_adapters)
        now = reading.get()
        return now if now is not None and now.blocks is blocks else None

    def _read_during(self, call: Callable, context: Context | None, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass with the layers reading; adds the blocks' attention weights if they are asked for."""
        now = self._reads(context, kwargs)
        if isinstance(context, MergedContext):
            kwargs = self._merge(context, kwargs, args)
        wanted = kwargs.get("output_attentions")
        wanted = getattr(self.config, "output_attentions", False) if wanted is None else wanted
        if now is None or now.context is None or not wanted:
            return reading.during(now, call, *args, **kwargs)
        with Attentions([block.attn for block in self.cross_attn_blocks]) as weights:
            output = reading.during(now, call, *args, **kwargs)
        if weights and isinstance(output, ModelOutput):
            output["cross_attentions"] = tuple(weights)
        return output


class CrossAttnModel(CrossAttnPreTrainedModel):
    """A backbone, without LM head, with its blocks. Mixed in before a family's class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.place_blocks()
        self.post_init()
        self.freeze_base()

    def place_blocks(self) -> None:
        """Create the blocks, and let the decoder layers call them."""
        stack, decoder_layers = find_layers(self, self.config.num_hidden_layers)
        if stack is not self:
            extend(stack, SkippableStack)
        _CAN_RECORD_REGISTRY[self] = self._can_record_outputs
        lora = self.config.decoder_lora
        self.decoder_lora = None if lora is None else place_adapters(decoder_layers, **lora)
        if self.config.reader == "merged":
            self._no_split_modules = _without_blocks(self._no_split_modules)
            states = len(self.config.encode_layers)
            reader = MergedReader(self, states, self.config.reader_rank, self.config.replayed_layers)
            self.cross_attn = nn.ModuleList([reader])
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
        states = head_only.get()
        if states is not None:
            return PrecomputedOutput(last_hidden_state=states)
        return self._read_during(super().forward, self._take_context(kwargs), *args, **kwargs)


class CrossAttnForCausalLM(FusedWeights, CrossAttnPreTrainedModel):
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

    def trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are in all."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        smoothing: float = 0.0,
        soft_targets: SoftTargets | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base's `forward` on `input_ids` (B, T), with at most one kind of context; without any, it is the base.

        Args:
            encoder_hidden_states: (C, S, d) as `encode` gives them; B is a multiple of C, and the rows that
                share a context lie together.
            encoder_attention_mask: (C, S), nonzero = attend.
            context_input_ids: (C, S) tokens, encoded here; `context_attention_mask` is theirs.
            context: a context that was projected ahead of time.
            context_lengths, context_groups: of packed contexts, of which each row reads some (`project_context`).
            labels: (B, T), -100 = ignored. They are shifted here, as in all of transformers; `shift_labels` (B, T)
                are what each position is to predict already.
            num_items_in_batch: divisor of the summed loss; the labels of this batch if not given.
            smoothing: probability mass that the loss spreads over the vocabulary.
            soft_targets: tokens (B, T, k) and their shares (B, T, k) that each labelled position is to predict in place
                of its one label; they are not shifted.
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
        loss = next_token_loss(states, head, targets, vocabulary, num_items, smoothing, soft_targets)
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
        logits = head_only.during(rows, super().forward, inputs_embeds=rows, use_cache=False).logits
        return logits.view(*hidden_states.shape[:-1], -1)

    def _generate_after(
        self, context: MergedContext, inputs: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """`kwargs` of `generate` on texts that follow a context, with an ordinary cache for every beam."""
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
    """Classes that sharding must not split, for a model without blocks: it expects to find each of them."""
    return [name for name in names or () if name not in NO_SPLIT]


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _described(value: Any) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"a {type(value).__name__}"
    )
