"""The merged reader: stored states become keys and values of every layer, and the base's own attention reads them.

A state of one layer is mapped linearly to what the key and value projections of each layer would have given for that
token. The rest (norms of the keys, rotary positions, the layout of the heads) is done by each layer's own code: the
decoder runs once over the context with the projections' outputs replaced, and a layer stops as soon as it hands its
keys and values to the cache. So no family needs code of its own, and what comes out is an ordinary cache.

Layers from the stored one on can be *replayed*: run again on the stored states, as the base ran them. Their keys and
values are those of the prompt but for the rounding of what is stored, at the cost of so many layers of a prompt.

Only the maps are trained, as one matrix for all layers. Nothing is added to the decoder: without a context it is the
base.

Shapes: C contexts, B decoder rows on them, S context tokens, T text tokens, d hidden size, K key/value heads, D head
size.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from dssk.models.layers import CallVariable, Mixed, extend, find_layers
from dssk.models.packing import picked_tokens

# Names of the modules that project an attention's input to keys and values. Of a fused projection, which makes the
# queries as well, only the outputs that become keys and values are mapped.
PROJECTIONS = (
    ("k_proj", "v_proj"),
    ("kv_a_proj_with_mqa",),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
)
EPS = 1e-6  # added to the mean square of a state

_capturing = CallVariable("dssk_capture")  # what the layers are to hand over, `_Capture`


class MergedLinear(nn.Linear):
    """The maps; a class of its own so that weight initialization finds it."""


class _Kept(Exception):
    """Raised when a layer has computed its keys and values: the rest of the layer is not needed."""


class _Capture(Cache):
    """In place of the KV cache while a context is read: keeps the keys and values of each layer, and ends the layer."""

    def __init__(
        self, outputs: dict[int, torch.Tensor], states: torch.Tensor, replayed: range, num_layers: int
    ):
        self.layers: list = []
        self.outputs = outputs  # of mapped projections, by their slot
        self.states = states  # (C, S, d) that the first replayed layer is given
        self.replayed = replayed
        self.kept: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def runs_whole(self, layer_idx: int) -> bool:
        """Whether a layer is run to its end, as the next one is replayed."""
        return layer_idx in self.replayed[:-1]

    def update(self, key_states, value_states, layer_idx: int, *args: Any, **kwargs: Any):
        self.kept[layer_idx] = (key_states, value_states)
        if self.runs_whole(layer_idx):
            return key_states, value_states
        raise _Kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class ContextCache(DynamicCache):
    """A KV cache that begins with a context; by its class a model knows that it reads one."""


class MappedProjection(Mixed):
    """Mixed into each projection of keys and values: during a capture its output is what the maps give."""

    merged_slot: (
        int  # its place among all projections; of one that makes queries alone, that of one beside it
    )
    merged_query: bool  # it makes queries alone
    merged_rows: int  # width of its output

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        capture = _capturing.get()
        if capture is None or self.merged_slot not in capture.outputs:  # its layer is replayed
            return super().forward(hidden_states, *args, **kwargs)
        if self.merged_query:
            return hidden_states.new_zeros(*hidden_states.shape[:-1], self.merged_rows)
        return capture.outputs[self.merged_slot].to(hidden_states)


class CapturedLayer(Mixed):
    """Mixed into each decoder layer: during a capture it ends where its keys and values are complete."""

    merged_returns: int | None = None  # how many values its forward pass returns; 0 for a bare tensor
    merged_index: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        capture = _capturing.get()
        if capture is None:
            output = super().forward(*args, **kwargs)
            self.merged_returns = len(output) if isinstance(output, tuple) else 0
            return output
        if self.merged_index in capture.replayed[:1]:
            if args:
                args = (capture.states.to(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = capture.states.to(kwargs["hidden_states"])
        if capture.runs_whole(self.merged_index):
            return super().forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        try:
            super().forward(*args, **kwargs)
        except _Kept:
            returns = self.merged_returns
            return (hidden_states, *[None] * (returns - 1)) if returns else hidden_states
        raise ValueError(
            f"{type(self).__name__} keeps no keys and values in a cache: it cannot read a merged context"
        )


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Clear the training flags of these modules alone: gradient checkpointing looks at them, and refuses a cache."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class MergedContext:
    """Keys and values of C contexts for every layer, to be put before any text in an ordinary KV cache.

    Made by `project_context` of a fused model. A context's tokens lie at the right end of its row, next to the text.
    """

    keys: tuple[torch.Tensor, ...]  # (C, K, S, D) for each layer
    values: tuple[torch.Tensor, ...]  # (C, K, S, D)
    mask: torch.Tensor  # (C, S) boolean, True = attend
    lengths: torch.Tensor  # (C,) positions of each context: a text continues from there

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __deepcopy__(self, memo: dict) -> "MergedContext":
        return self  # generation copies its arguments; nothing here is ever written to

    def of_rows(self, numbers: list[int]) -> "MergedContext":
        """Select a context for each decoder row by its number; a number may repeat."""
        keys, values = (tuple(t[numbers] for t in tensors) for tensors in (self.keys, self.values))
        return MergedContext(keys, values, self.mask[numbers], self.lengths[numbers])

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    def packed(self) -> "MergedContext":
        """The same contexts one behind the other, without padding: one row of all their tokens."""
        keys, values = (
            tuple(t.transpose(1, 2)[self.mask.to(t.device)][None].transpose(1, 2) for t in tensors)
            for tensors in (self.keys, self.values)
        )
        return MergedContext(keys, values, self.mask[self.mask][None], self.lengths.sum()[None])

    def gathered(self, tokens: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> "MergedContext":
        """From packed contexts, gather the `tokens` (B, L) that each row reads; `mask` (B, L) is False at padding.

        Each of several contexts keeps its own positions from 0; a text continues from position `lengths` (B,).
        """
        keys = tuple(picked_tokens(tensor, tokens) for tensor in self.keys)
        return MergedContext(
            keys, tuple(picked_tokens(tensor, tokens) for tensor in self.values), mask, lengths
        )

    def cache(self, config: Any, rows: int | None = None) -> DynamicCache:
        """An ordinary cache for `rows` decoder rows (a multiple of C; C if not given), those of a context together."""
        repeats = self.repeats(len(self) if rows is None else rows)
        cache = ContextCache(config=config)
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if repeats > 1:
                keys, values = (tensor.repeat_interleave(repeats, 0) for tensor in (keys, values))
            cache.update(keys, values, index)
        return cache

    def repeats(self, rows: int) -> int:
        """How many decoder rows read each context. Raises `ValueError` for a number that does not divide."""
        if rows % len(self):
            raise ValueError(f"{rows} decoder rows cannot share {len(self)} contexts: want a multiple")
        return rows // len(self)

    def mask_and_positions(
        self, attention_mask: torch.Tensor | None, rows: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask (B, S + T) and positions (B, T) of texts that follow the context in the cache.

        `attention_mask` (B, T) says where the texts have tokens; everywhere if it is None.
        """
        repeats = self.repeats(rows)
        mask = self.mask.repeat_interleave(repeats, 0)
        if attention_mask is None:
            attention_mask = mask.new_ones(rows, tokens)
        text = attention_mask.to(mask.device)
        positions = (text.long().cumsum(-1) - 1).clamp(min=0) + self.lengths.repeat_interleave(repeats)[
            :, None
        ]
        return torch.cat([mask.long(), text.long()], 1), positions[:, -tokens:]


class MergedReader(nn.Module):
    """Maps from stored states to the outputs of each layer's key and value projections, but for replayed layers.

    Args:
        backbone: the decoder without its LM head; its layers and projections are extended so that their keys and
            values can be captured. Its weights are not changed, and no reference to it is kept.
        num_states: number of layers whose states are stored, concatenated, for each token.
        rank: width of a bottleneck that all maps share; `None` for full maps.
        replayed: the layers that are run again on the (last) stored state, which is the input of the first of them.
    """

    shift: torch.Tensor  # (num_states x d,) mean of a normalized state
    scale: torch.Tensor  # (num_states x d,) one over its standard deviation
    rows: torch.Tensor  # (all mapped outputs,) which output of its projection each is

    def __init__(
        self,
        backbone: nn.Module,
        num_states: int = 1,
        rank: int | None = None,
        replayed: range = range(0),
    ):
        super().__init__()
        config: Any = backbone.config
        text = config.get_text_config()
        self.num_states, self.rank, self.replayed = num_states, rank, replayed
        self.num_layers: int = text.num_hidden_layers
        every = _prepare(find_layers(backbone, self.num_layers)[1], text)
        mapped_layers = set(self.mapped_layers)
        self.slots = [slot for slot, (layer, *_) in enumerate(every) if layer in mapped_layers]
        self.widths = [every[slot][1:] for slot in self.slots]
        width, outputs = num_states * text.hidden_size, sum(mapped for mapped, _ in self.widths)
        self.down = None if rank is None else MergedLinear(width, rank, bias=False)
        self.up = MergedLinear(width if rank is None else rank, outputs)
        # Middle layers have a few dimensions that are far larger than the rest: each is scaled to unit variance.
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("rows", self.last_rows(), persistent=self.fused)

    @property
    def mapped_layers(self) -> list[int]:
        """The layers whose keys and values the maps make."""
        return [layer for layer in range(self.num_layers) if layer not in self.replayed]

    @property
    def fused(self) -> bool:
        """Whether projections make queries as well, so that only some of their outputs are mapped."""
        return any(mapped < whole for mapped, whole in self.widths)

    def last_rows(self) -> torch.Tensor:
        """The last outputs of each projection: taken for keys and values until `find_rows` has looked."""
        return torch.cat([torch.arange(whole - mapped, whole) for mapped, whole in self.widths])

    def maps(self, states: torch.Tensor) -> torch.Tensor:
        """All mapped outputs (C, S, rows) of states (C, S, num_states x d) as they are stored."""
        states = (normalized(states.to(self.up.weight.dtype), self.num_states) - self.shift) * self.scale
        return self.up(states if self.down is None else self.down(states))

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        """The outputs (C, S, whole) of each mapped projection for states (C, S, num_states x d) as they are stored."""
        return self._outputs(self.maps(states))

    def _outputs(self, mapped: torch.Tensor) -> list[torch.Tensor]:
        """The outputs (C, S, whole) of each projection, zero in rows that are not mapped."""
        mapped_widths = [width for width, _ in self.widths]
        outputs = []
        # Split, not sliced: each slice would have a gradient as large as the whole.
        for part, rows, (width, whole) in zip(
            mapped.split(mapped_widths, -1), self.rows.split(mapped_widths), self.widths, strict=True
        ):
            if width < whole:
                part = part.new_zeros(*part.shape[:-1], whole).index_copy(-1, rows, part)
            outputs.append(part)
        return outputs

    def capture(
        self,
        backbone: nn.Module,
        outputs: list[torch.Tensor],
        positions: torch.Tensor,
        states: torch.Tensor,
        tokens: torch.Tensor,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (C, K, S, D) each, for given outputs of their projections.

        Layers that are replayed make them from states (C, S, num_states x d); `tokens` (C, S) is False at padding.
        """
        config: Any = backbone.config
        stack, layers = find_layers(backbone, self.num_layers)
        width = config.get_text_config().hidden_size
        embedded = outputs[0].new_zeros(*positions.shape, width, dtype=_dtype(backbone))
        given = {"position_ids": positions} if accepts(backbone, "position_ids") else {}
        if self.replayed:
            given["attention_mask"] = tokens.long()
            states = states[..., -width:].to(embedded.dtype)
        capture = _Capture(
            dict(zip(self.slots, outputs, strict=True)), states, self.replayed, self.num_layers
        )
        with _evaluating([backbone, stack, *layers]):
            if layers[0].merged_returns is None:  # an ordinary run shows what the layers return
                with torch.no_grad():
                    backbone(inputs_embeds=embedded[:1, :1], use_cache=False)
            inputs = {"inputs_embeds": embedded, "past_key_values": capture, "use_cache": True, **given}
            _capturing.during(capture, backbone, **inputs)
        return [pair for pair in capture.kept if pair is not None]

    @torch.no_grad()
    def find_rows(self, backbone: nn.Module) -> None:
        """Find which outputs of each projection its layer's keys and values come from: those with a gradient."""
        if not self.fused:
            return
        generator = torch.Generator().manual_seed(0)
        device = self.rows.device
        with torch.enable_grad():
            outputs = [
                torch.randn(1, 2, whole, generator=generator).to(device).requires_grad_()
                for _, whole in self.widths
            ]
            positions = torch.arange(2, device=device)[None]
            states = torch.zeros(1, 2, len(self.shift), device=device)
            kept = self.capture(backbone, outputs, positions, states, torch.ones_like(positions))
            flat = torch.cat([tensor.float().flatten() for pair in kept for tensor in pair])
            gradients = torch.autograd.grad(
                flat @ torch.randn(len(flat), generator=generator).to(device), outputs
            )
        found = [gradient.abs().amax((0, 1)).nonzero()[:, 0] for gradient in gradients]
        for rows, (width, _) in zip(found, self.widths, strict=True):
            if len(rows) != width:
                raise ValueError(
                    f"{type(backbone).__name__} makes keys and values from {len(rows)} outputs of a projection, "
                    f"expected {width}: the merged reader cannot be used with it"
                )
        self.rows.copy_(torch.cat(found))


def read_context(
    reader: MergedReader,
    backbone: nn.Module,
    states: torch.Tensor,
    mask: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> MergedContext:
    """Keys and values of contexts (C, S, num_states x d); `mask` (C, S) boolean, True = a token.

    Padding may stand on either side. Tokens that `hidden` (C, S) names keep their positions, but no text sees them.
    With `positions` (C, S) all tokens are visible and stand where these say. No layer is replayed then: contexts in
    one row would see each other.

    A function, and not what the reader does when it is called: sharding and offloading wrap that call, and would move
    or gather the whole backbone with the reader.
    """
    if positions is not None and reader.replayed:
        raise ValueError("layers cannot be run again on several contexts in one row: want a row for each")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    order = mask.long().argsort(dim=-1, stable=True)  # padding first, then the tokens in their order
    lengths = mask.sum(-1)
    visible = mask if hidden is None else mask & ~hidden
    ordered = states.gather(1, order[..., None].expand_as(states))
    count = states.shape[1]
    if positions is None:
        positions = (torch.arange(count, device=mask.device) - count + lengths[:, None]).clamp(min=0)
    kept = reader.capture(backbone, reader(ordered), positions, ordered, mask.gather(1, order))
    keys, values = zip(*kept, strict=True)
    return MergedContext(keys, values, visible.gather(1, order), lengths)


def normalized(states: torch.Tensor, num_states: int = 1) -> torch.Tensor:
    """Each state (..., num_states x d) divided by its root mean square: attention sinks are huge in middle layers."""
    parts = states.unflatten(-1, (num_states, -1))
    return (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + EPS)).flatten(-2)


def accepts(module: nn.Module, name: str) -> bool:
    """Whether a model's forward pass has this parameter."""
    return name in inspect.signature(module.forward).parameters


def arguments(
    model: Any,
    context: MergedContext,
    attention_mask: torch.Tensor | None,
    rows: int,
    tokens: int,
) -> dict[str, Any]:
    """The arguments with which a plain model continues after a context: cache, mask and positions."""
    mask, positions = context.mask_and_positions(attention_mask, rows, tokens)
    given: dict[str, Any] = {"past_key_values": context.cache(model.config, rows), "attention_mask": mask}
    return given | ({"position_ids": positions} if accepts(model, "position_ids") else {})


def find_projections(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a decoder layer that make its keys and values, by name, in a fixed order."""
    modules = [(name.rpartition(".")[2], module) for name, module in layer.named_modules()]
    for names in PROJECTIONS:
        found = [next(((n, m) for n, m in modules if n == name), None) for name in names]
        if all(found):
            return [pair for pair in found if pair is not None]
    return []


def _prepare(layers: nn.ModuleList, config: Any) -> list[tuple[int, int, int]]:
    """Extend layers and projections for capturing; returns (layer, mapped outputs, all outputs) of each projection."""
    widths: list[tuple[int, int, int]] = []
    for index, layer in enumerate(layers):
        projections = find_projections(layer)
        if not projections:
            raise ValueError(
                f"layer {index} of a {config.model_type} model has no attention with projections of its own "
                f"({', '.join('/'.join(names) for names in PROJECTIONS)}): it cannot read a merged context"
            )
        slot = len(widths)
        for name, module in projections:
            whole = _extend(module, len(widths))
            mapped = (
                whole if name in ("k_proj", "v_proj", "kv_a_proj_with_mqa") else whole - _query_width(config)
            )
            widths.append((index, mapped, whole))
        if (query := next((m for n, m in layer.named_modules() if n.endswith("q_proj")), None)) is not None:
            _extend(query, slot, query=True)
        extend(layer, CapturedLayer, merged_index=index)
    return widths


def _extend(module: nn.Module, slot: int, query: bool = False) -> int:
    """Let a projection be mapped, as that of a slot; returns the width of its output."""
    rows = _out_features(module)
    extend(module, MappedProjection, merged_slot=slot, merged_query=query, merged_rows=rows)
    return rows


def _out_features(module: nn.Module) -> int:
    out: Any = getattr(module, "out_features", None) or getattr(module, "nf", None)  # transformers' Conv1D
    return out


def _query_width(config: Any) -> int:
    """Outputs of a projection of queries, keys and values that are queries."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _dtype(backbone: nn.Module) -> torch.dtype:
    embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.dtype
