"""How a context reaches the decoder layers: variables that are set during a call, and mixins that read them."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from dssk.models.layers import CallVariable, Mixed


class Reading(NamedTuple):
    """The reader, context and adapters of a fused model during a call."""

    blocks: nn.ModuleList  # whose model it is: another one that is called meanwhile reads something else
    context: Any  # the `ProjectedContext` that blocks attend to; None if it is in the cache
    adapters: nn.ModuleDict | None  # of the decoder's projections


reading = CallVariable("dssk_reading")  # a `Reading`, None without a context
head_only = CallVariable("dssk_head_only")  # last hidden states, when only the LM head is to be computed


class ReadingLayer(Mixed):
    """Mixed into each decoder layer; one that has a block calls it before or after itself."""

    cross_attn_index: int | None = None  # which set of block weights; None for a layer without a block
    cross_attn_final: bool = False
    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = reading.get()
        if now is None or now.context is None or self.cross_attn_index is None:
            return super().__call__(*args, **kwargs)
        index, context = self.cross_attn_index, now.context
        # The block is looked up at each call, as other libraries replace modules; it checkpoints itself.
        block = now.blocks[index]

        def read(hidden_states: torch.Tensor) -> torch.Tensor:
            # Positional: reentrant checkpointing tracks gradients of positional arguments alone.
            return block(hidden_states, context.keys[index], context.values[index], context.mask)

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


class SkippableStack(Mixed):
    """Mixed into the module that runs the layers: returns given states when only the LM head is to be computed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = head_only.get()
        if states is None:
            return super().forward(*args, **kwargs)
        return PrecomputedOutput(last_hidden_state=states)


class PrecomputedOutput(BaseModelOutputWithPast):
    """The output of a backbone with given states; any other attribute that a family's LM head reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Attentions:
    """Collects the attention weights of modules inside a `with` block, in order of the calls: lowest layer first."""

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


def hide_tokens(mask: torch.Tensor, prob: float) -> torch.Tensor:
    """Hide each visible token of a boolean mask (C, S) with probability `prob`, but never a row's last visible one.

    The token with the highest draw of its row always stays.
    """
    draws = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    return mask & ((draws >= prob) | (draws == draws.amax(-1, keepdim=True)))
