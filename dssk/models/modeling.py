"""StarCoder with cross-attention: a frozen GPTBigCode decoder, and the blocks placed into it.

What is unusual here:
- The base model's weights keep their own names, so any GPTBigCode checkpoint loads; all new ones live under
  `transformer.cross_attn`, once each, however many decoder layers use them.
- A context is projected to keys and values once (`project_context`) and then shared by all tokens, beams and
  questions. With shared weights one projection also serves every layer.
- Without a context the blocks are skipped: the model *is* its base, bit for bit.

Shapes as in `cross_attention.py`: B decoder rows, T decoder tokens, C contexts, S context tokens, d hidden size.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, GPTBigCodeModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeBlock, GPTBigCodeMLP
from transformers.utils import cached_file
from transformers.utils.output_capturing import OutputRecorder

from dssk.inference.answering import answer
from dssk.models.configuration import CrossAttnGPTBigCodeConfig
from dssk.models.cross_attention import (
    CrossAttention,
    CrossAttnBlock,
    CrossAttnLinear,
    CrossAttnOutput,
    ProjectedContext,
)
from dssk.models.loss import labelled_positions, next_token_loss

WEIGHTS_FILE = "model.safetensors"


def is_cross_attn(name: str) -> bool:
    """Whether a parameter belongs to the cross-attention blocks: these are trained, saved apart and counted."""
    return "cross_attn." in name


class SparseMLP(GPTBigCodeMLP):
    """The MLP of the last decoder layer, which can leave out positions that nothing above looks at."""

    def __init__(self, intermediate_size: int, config: CrossAttnGPTBigCodeConfig):
        super().__init__(intermediate_size, config)
        self._needed: torch.Tensor | None = None

    @contextmanager
    def only(self, needed: torch.Tensor) -> Iterator[None]:
        """Inside, compute the positions `needed` (B, N) alone; the others are zero."""
        self._needed = needed
        try:
            yield
        finally:
            self._needed = None

    def forward(self, hidden_states):
        if self._needed is None:
            return super().forward(hidden_states)
        index = self._needed[..., None].expand(-1, -1, hidden_states.shape[-1])
        picked = super().forward(hidden_states.gather(1, index))
        return picked.new_zeros(hidden_states.shape).scatter(1, index, picked)  # autocast changes the type


class CrossAttnGPTBigCodeBlock(GPTBigCodeBlock):
    """A decoder block that reads the context before (or after) its own work."""

    def __init__(
        self, config: CrossAttnGPTBigCodeConfig, layer_idx: int, cross_attn: CrossAttnBlock, index: int
    ):
        super().__init__(config, layer_idx)
        # In a tuple the block is not registered a second time: its weights have one name, shared or not.
        self._cross_attn = (cross_attn,)
        self._index = index
        self._final = config.cross_attn_final_layer
        self._last = layer_idx == config.n_layer - 1
        if self._last:
            self.mlp = SparseMLP(self.inner_dim, config)

    def __call__(self, hidden_states, *args, context: ProjectedContext | None = None, needed=None, **kwargs):
        """Hand keys and values on as positional arguments: reentrant checkpointing tracks gradients only of those."""
        if context is None:
            return super().__call__(hidden_states, *args, **kwargs)
        keys, values = context.keys[self._index], context.values[self._index]
        return super().__call__(
            hidden_states, keys, values, context_mask=context.mask, needed=needed, **kwargs
        )

    def forward(self, hidden_states, keys=None, values=None, context_mask=None, needed=None, **kwargs):
        if values is None:
            return super().forward(hidden_states, **kwargs)
        (cross_attn,) = self._cross_attn
        if not self._last:
            needed = None
        if not self._final:
            return self._decode(cross_attn(hidden_states, keys, values, context_mask), needed, **kwargs)
        hidden_states = self._decode(hidden_states, needed, **kwargs)
        if needed is None:
            return cross_attn(hidden_states, keys, values, context_mask)
        # Nothing above looks at other positions: only those that the loss reads need to pass the block.
        index = needed[..., None].expand(-1, -1, hidden_states.shape[-1])
        picked = cross_attn(hidden_states.gather(1, index), keys, values, context_mask)
        return hidden_states.scatter(1, index, picked)

    def _decode(self, hidden_states, needed, **kwargs):
        """The decoder's own layer; the MLP only where a position is needed."""
        if needed is None:
            return super().forward(hidden_states, **kwargs)
        with self.mlp.only(needed):
            return super().forward(hidden_states, **kwargs)


class CrossAttnGPTBigCodeModel(GPTBigCodeModel):
    """The decoder without its LM head."""

    config_class = CrossAttnGPTBigCodeConfig
    _no_split_modules = ["GPTBigCodeBlock", "CrossAttnGPTBigCodeBlock", "CrossAttnBlock"]
    _can_record_outputs = {
        **GPTBigCodeModel._can_record_outputs,
        "cross_attentions": OutputRecorder(CrossAttention, index=1),
    }

    def __init__(self, config: CrossAttnGPTBigCodeConfig):
        super().__init__(config)
        layers = config.cross_attn_layers
        distinct = 1 if config.cross_attn_shared_weights else len(layers)
        blocks = [CrossAttnBlock(config) for _ in range(distinct)]
        self.cross_attn = nn.ModuleList(blocks)
        for number, layer_idx in enumerate(layers):
            index = number % distinct
            self.h[layer_idx] = CrossAttnGPTBigCodeBlock(config, layer_idx, blocks[index], index)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossAttnOutput) and self.config.cross_attn_init != "normal":
            init.zeros_(module.weight)
        elif isinstance(module, CrossAttnLinear):
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


class CrossAttnGPTBigCodeForCausalLM(GPTBigCodeForCausalLM):
    """A frozen StarCoder-family model that answers from cached contexts.

    >>> model = CrossAttnGPTBigCodeForCausalLM.from_base("bigcode/starcoderbase-1b", num_cross_attn_layers=6)
    >>> states, mask = model.encode(**tokenizer(["context: ..."], return_tensors="pt"))
    >>> context = model.project_context(states, mask)
    >>> model.generate(**tokenizer(["question: ... \\n answer:"], return_tensors="pt"), context=context)
    """

    config_class = CrossAttnGPTBigCodeConfig
    _no_split_modules = CrossAttnGPTBigCodeModel._no_split_modules

    def __init__(self, config: CrossAttnGPTBigCodeConfig):
        super().__init__(config)
        self.transformer = CrossAttnGPTBigCodeModel(config)
        self.post_init()
        self.freeze_base()

    @classmethod
    def from_base(
        cls, base: str | os.PathLike, revision: str | None = None, **kwargs: Any
    ) -> "CrossAttnGPTBigCodeForCausalLM":
        """Place new cross-attention blocks into the GPTBigCode model at `base`, a folder or a name on the Hub.

        `kwargs` are the fields of `CrossAttnGPTBigCodeConfig`; any other goes to `from_pretrained` (`dtype`,
        `device_map`, ...). Raises `ValueError` for an impossible layout or a base of another kind.
        """
        ours = {k: kwargs.pop(k) for k in list(kwargs) if k in CrossAttnGPTBigCodeConfig.__annotations__}
        base_config = GPTBigCodeConfig.from_pretrained(base, revision=revision)
        if base_config.model_type != GPTBigCodeConfig.model_type:
            raise ValueError(f"{base} is a {base_config.model_type} model, want gpt_bigcode")
        inherited = base_config.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            inherited.pop(key, None)
        config = CrossAttnGPTBigCodeConfig(
            **inherited,
            **ours,
            base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else str(base),
            base_model_revision=revision,
        )
        return cls._load_base(base, config, revision=revision, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load a fused model, or cross-attention weights alone together with the base model they name.

        `base_model` (a folder or a Hub name) overrides where the base is looked for.
        """
        base = kwargs.pop("base_model", None)
        config = kwargs.pop("config", None)
        if not isinstance(config, CrossAttnGPTBigCodeConfig):
            hub = {
                k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs
            }
            config = CrossAttnGPTBigCodeConfig.from_pretrained(path, **hub)
        if config.cross_attn_only:
            revision = kwargs.pop("revision", None)
            weights = cached_file(path, WEIGHTS_FILE, revision=revision)
            base = base or config.base_model_name_or_path
            model = cls._load_base(base, config, revision=config.base_model_revision, **kwargs)
            model.load_cross_attention(load_file(weights))
            return model
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
        if missing := [name for name in info["missing_keys"] if is_cross_attn(name)]:
            raise ValueError(f"{path} has no weights for {missing[0]} and {len(missing) - 1} more")
        model.freeze_base()
        return (model, info) if with_info else model

    @classmethod
    def _load_base(
        cls, base, config: CrossAttnGPTBigCodeConfig, **kwargs: Any
    ) -> "CrossAttnGPTBigCodeForCausalLM":
        """Base weights under their own names; exactly the cross-attention weights are new."""
        with _quiet_load_report():  # checked below, more strictly
            model, info = super().from_pretrained(base, config=config, output_loading_info=True, **kwargs)
        expected = {name for name, _ in model.named_parameters() if is_cross_attn(name)}
        if strange := (set(info["missing_keys"]) ^ expected) | set(info["unexpected_keys"]):
            raise ValueError(
                f"{base} is not a plain GPTBigCode checkpoint: {len(strange)} keys, {sorted(strange)[0]}"
            )
        model.freeze_base()
        return model

    def load_cross_attention(self, weights: dict[str, torch.Tensor]) -> None:
        """Load cross-attention weights, exactly those this model has; raises `ValueError` for any other set."""
        own = {name: p for name, p in self.named_parameters() if is_cross_attn(name)}
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
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {name: t for name, t in state_dict.items() if is_cross_attn(name)}
        was, self.config.cross_attn_only = self.config.cross_attn_only, cross_attn_only
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.cross_attn_only = was

    def freeze_base(self) -> None:
        """Leave gradients to the cross-attention blocks alone."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_cross_attn(name))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.freeze_base()
        return embeddings

    def train(self, mode: bool = True):
        """Only the cross-attention blocks are ever in train mode; the base stays in eval (no dropout)."""
        super().train(False)
        self.training = self.transformer.training = mode
        self.transformer.cross_attn.train(mode)
        # Gradient checkpointing looks at a block's own flag. Below the lowest cross-attention block there is
        # nothing to differentiate, and nothing inside a block looks at the flag.
        for block in self.transformer.h[min(self.config.cross_attn_layers) :]:
            block.training = mode
        return self

    def trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are in all."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """One line, as in PEFT."""
        trainable, total = self.trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
        )

    @torch.no_grad()
    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode contexts (C, S) with the base: states (C, S, d) after `ln_f`, and their boolean mask (C, S)."""
        states = self.transformer(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return states, mask.bool()

    def project_context(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> ProjectedContext:
        """Project encoder states (C, S, d) to what the blocks attend to, once for all tokens and questions.

        In training, `cross_attn_dropout_prob` of the tokens are hidden here, never all of a context's.
        """
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        if self.training and self.config.cross_attn_dropout_prob > 0:
            if mask is None:
                mask = torch.ones(
                    encoder_hidden_states.shape[:2], dtype=torch.bool, device=encoder_hidden_states.device
                )
            mask = hide_tokens(mask, self.config.cross_attn_dropout_prob)
        elif mask is not None and not self.training and bool(mask.all()):
            mask = None  # attention without a mask takes the faster kernels
        blocks: Any = self.transformer.cross_attn
        states = encoder_hidden_states.to(blocks[0].ln_1.weight)
        keys, values = zip(*(block.attn.project_context(states) for block in blocks), strict=True)
        return ProjectedContext(keys, values, None if mask is None else mask.to(states.device))

    def answer(
        self,
        questions: str | Sequence[str],
        contexts: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **generate: Any,
    ) -> Any:
        """Answer one question with a text, or several with a list of texts.

        Args:
            contexts: what the answer is to be found in: a text, encoder states (S, d), or a list of these, which
                are encoded apart and attended to together. With several questions, a list of one such entry a
                question, or one text, states or `ProjectedContext` for all. `None` asks the base.
            tokenizer: with the padding token set, as `dssk.tokenizer.load_tokenizer` does. If not given it is loaded
                on each call from where the model was loaded from.
            generate: `batch_size` (32 questions), `show_progress`; the rest goes to `generate`. By default that is
                greedy and ends after 32 tokens.

        A text is encoded once, however many questions it is given with, and cut to the model's positions.
        """
        return answer(self, questions, contexts, tokenizer, **generate)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_attention_mask: torch.Tensor | None = None,
        context: ProjectedContext | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_smoothing: float = 0.0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Decode `input_ids` (B, T) from at most one kind of context; without any, this is the base model.

        Args:
            encoder_hidden_states: (C, S, d) as `encode` gives them; B is a multiple of C, and the rows that
                share a context lie together.
            encoder_attention_mask: (C, S), nonzero = attend.
            context_input_ids: (C, S) tokens, encoded here.
            context: a context that was projected ahead of time.
            labels: (B, T), -100 = ignored. They are shifted here, as in all of transformers.
            num_items_in_batch: divisor of the summed loss; the labels of this batch if not given.
            skip_logits: with labels, return no logits and never compute those of unlabelled positions;
                the default in train mode. The last hidden states of such positions are then not to be used.
        """
        if context is None:
            context = self._read_context(
                encoder_hidden_states, encoder_attention_mask, context_input_ids, context_attention_mask
            )
        inputs = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **({} if context is None else {"context": context}),
            **kwargs,
        }
        if labels is None:
            return super().forward(input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **inputs)
        skip_logits = self.training if skip_logits is None else skip_logits
        if skip_logits and context is not None:
            inputs["needed"] = labelled_positions(labels)
        outputs = self.transformer(input_ids, use_cache=bool(use_cache) and not self.training, **inputs)
        hidden_states = outputs.last_hidden_state
        loss = next_token_loss(
            hidden_states, self.lm_head.weight, labels, num_items_in_batch, label_smoothing
        )
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=None if skip_logits else self.lm_head(hidden_states),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any):
        """As in transformers, with a context: `encoder_hidden_states` and `encoder_attention_mask`,
        `context_input_ids` and `context_attention_mask`, or `context` from `project_context`.

        It is read and projected once, and not repeated for beams or returned sequences.
        """
        if kwargs.get("context") is None:
            names = (
                "encoder_hidden_states",
                "encoder_attention_mask",
                "context_input_ids",
                "context_attention_mask",
            )
            kwargs["context"] = self._read_context(*(kwargs.pop(name, None) for name in names))
        return super().generate(inputs, *args, **kwargs)

    def _read_context(
        self,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        context_input_ids: torch.Tensor | None,
        context_attention_mask: torch.Tensor | None,
    ) -> ProjectedContext | None:
        if context_input_ids is not None:
            if encoder_hidden_states is not None:
                raise ValueError("got encoder_hidden_states and context_input_ids, want one of them")
            encoder_hidden_states, encoder_attention_mask = self.encode(
                context_input_ids, context_attention_mask
            )
        if encoder_hidden_states is None:
            return None
        return self.project_context(encoder_hidden_states, encoder_attention_mask)


def hide_tokens(mask: torch.Tensor, prob: float) -> torch.Tensor:
    """Hide each visible token of a boolean mask (C, S) with probability `prob`, but never a row's last visible one.

    The token with the highest draw of its row always stays.
    """
    draws = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    return mask & ((draws >= prob) | (draws == draws.amax(-1, keepdim=True)))


@contextmanager
def _quiet_load_report() -> Iterator[None]:
    """Silence transformers' report on missing weights; its level is left alone, other checks look at it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
