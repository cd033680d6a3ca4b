"""Low-rank adapters of the decoder's linear layers (LoRA, arXiv 2106.09685), which act only while a context is read.

The base is unchanged: contexts are encoded without adapters, and without a context no adapter is used. So the decoder
can be trained together with its reader, and stores of the frozen base's states stay valid.

peft would wrap each layer. Then the base's weights have other names (`q_proj.base_layer.weight`) in memory and on disk,
and adapters are on or off for a model, not for a call: no two threads could read and encode. Here a mixin is put before
the layer's own class, as for all layers that read, and the adapters' weights are kept apart from the base's.

Only linear modules are adapted, not experts that are stored as one three-dimensional tensor, as in most families.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dssk.models.layers import Mixed, extend
from dssk.models.reading import reading


class Adapter(nn.Module):
    """A low-rank addition to a linear layer's output: (..., inputs) -> (..., outputs), zero before training."""

    def __init__(self, inputs: int, outputs: int, rank: int, scaling: float):
        super().__init__()
        self.scaling = scaling
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Under autocast fp32 copies would be made for nothing.
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self.down.dtype)
        inner = nn.functional.linear(hidden_states, self.down)
        return nn.functional.linear(inner * self.scaling, self.up)


class AdaptedLinear(Mixed):
    """Mixed into each linear layer of the decoder."""

    adapter_name: str  # among the model's adapters

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super().forward(hidden_states, *args, **kwargs)
        now = reading.get()
        if now is None or now.adapters is None:
            return output
        return output + now.adapters[self.adapter_name](hidden_states).to(output)


def place_adapters(layers: nn.ModuleList, rank: int, alpha: float) -> nn.ModuleDict:
    """Create an adapter for each linear layer of the decoder layers, scaled by alpha / rank, and let it be used."""
    adapters = nn.ModuleDict()
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = f"{index}_{path.replace('.', '_')}"
                inputs, outputs = _sizes(module)
                adapters[name] = Adapter(inputs, outputs, rank, alpha / rank)
                extend(module, AdaptedLinear, adapter_name=name)
    return adapters


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features
