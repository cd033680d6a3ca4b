"""A merged reader without training: maps in closed form, for the layer whose states predict a text's continuation best.

Nothing but text is needed. For each candidate layer, the keys and values of all layers are regressed on the states that
would be stored. The layer is then scored by the likelihood of the continuations of held-out texts, whose beginnings the
base reads from their stored states.

Shapes: C contexts, S context tokens, N tokens of a batch, i = d x number of stored layers, o mapped outputs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dssk.errors import Diverged, DsskError
from dssk.inference.auto import from_base
from dssk.inference.batching import length_batches, length_mask, pad_tokens
from dssk.inference.rounding import DEFAULT_STORAGE, StorageDtype, rounded
from dssk.models.closed_form import FIRST_TOKEN_WEIGHT, NormalEquations
from dssk.models.layers import encode_states, find_layers, layer_inputs, layers_name
from dssk.models.merged import (
    MergedContext,
    MergedReader,
    arguments,
    find_projections,
    normalized,
    read_context,
)

BATCH_ROWS, BATCH_TOKENS = 8, 4096  # of texts that go through the base together
SCAN_TOKENS = 8_000  # that the maps of each layer are fitted on to compare them
FIT_TOKENS = 20_000  # that maps are fitted on: some dozens for each dimension of a state
MEMORY_BYTES = 4 << 30  # for the normal equations of one pass over the texts; more layers take more passes
CONTINUATION_TOKENS = 64  # of a held-out text that are scored
SHORTEST_TEXT = 2 * CONTINUATION_TOKENS  # of a text that can be held out

Tokens = Sequence[int]
Layers = tuple[int, ...]  # whose states are stored, one behind the other


@dataclass(frozen=True)
class LayerScore:
    """The score of the states of one layer, or of two, with maps in closed form."""

    layers: Layers
    nll: float  # of held-out continuations, nats a token
    explained: float  # mean share of the variance of keys and values that the maps explain, on fitted texts


@dataclass(frozen=True)
class Scan:
    """The result of `scan`."""

    scores: list[LayerScore]
    prompted_nll: float  # of the same continuations when the base reads the text itself
    unread_nll: float  # when it knows nothing of it
    tokens: int  # that the maps were fitted on
    best: LayerScore
    reader: MergedReader  # with the maps of the best

    def to_dict(self) -> dict[str, Any]:
        """The scores, as JSON."""
        names = ("prompted_nll", "unread_nll", "tokens")
        return {
            "recommended": list(self.best.layers),
            **{name: getattr(self, name) for name in names},
            "layers": [
                {"layers": list(s.layers), "nll": s.nll, "explained_variance": s.explained}
                for s in self.scores
            ],
        }


def fit(
    base: PreTrainedModel,
    reader: MergedReader,
    texts: Sequence[Tokens],
    candidates: Sequence[Layers],
    storage_dtype: StorageDtype = DEFAULT_STORAGE,
) -> dict[Layers, NormalEquations]:
    """Normal equations for the maps from each candidate's states, over all tokens of the texts."""
    width: int = base.config.get_text_config().hidden_size
    outputs = sum(mapped for mapped, _ in reader.widths)
    sums = {c: NormalEquations(len(c) * width, outputs, base.device) for c in candidates}
    wanted = sorted({layer for candidate in candidates for layer in candidate})
    for ids in _batches(texts):
        states, mapped, mask = _observe(base, reader, ids, wanted)
        first = torch.zeros_like(mask)
        first[:, 0] = True
        weights = 1 + (FIRST_TOKEN_WEIGHT - 1) * first[mask].float()
        for candidate, equations in sums.items():
            stored = rounded(torch.cat([states[layer][mask] for layer in candidate], -1), storage_dtype)
            equations.add(normalized(stored.float(), len(candidate)), mapped[mask], weights)
    return sums


@torch.no_grad()
def load_maps(reader: MergedReader, equations: NormalEquations) -> float:
    """Set a reader's maps in closed form; returns the mean share of variance that they explain."""
    matrix, bias = equations.solve()
    if reader.down is None:
        reader.up.weight.copy_(matrix)
    else:
        down, up = equations.low_rank(matrix, reader.down.out_features)
        reader.down.weight.copy_(down)
        reader.up.weight.copy_(up)
        matrix = up @ down
    reader.up.bias.copy_(bias)
    reader.shift.copy_(equations.mean)
    reader.scale.copy_(1 / equations.deviation)
    return equations.explained(matrix, bias).mean().item()


@torch.no_grad()
def fit_reader(
    model: Any,
    texts: Iterable[Tokens],
    storage_dtype: StorageDtype = DEFAULT_STORAGE,
    num_tokens: int = FIT_TOKENS,
) -> float:
    """Set the maps of a fused model's merged reader in closed form, on about `num_tokens` tokens of these texts.

    Returns the mean share of variance that they explain.
    """
    reader: MergedReader = model.cross_attn_blocks[0]
    reader.find_rows(model.base_model)
    layers = model.config.encode_layers
    return load_maps(
        reader, fit(model, reader, first_tokens(texts, num_tokens), [layers], storage_dtype)[layers]
    )


def first_tokens(texts: Iterable[Tokens], count: int) -> list[Tokens]:
    """The first texts that have `count` tokens together, the last one cut."""
    taken: list[Tokens] = []
    for text in texts:
        if count <= 0:
            break
        taken.append(text[:count])
        count -= len(text)
    return taken


@torch.no_grad()
def scan(
    base: PreTrainedModel,
    texts: Sequence[Tokens],
    held_out: Sequence[Tokens],
    candidates: Sequence[Layers],
    storage_dtype: StorageDtype = DEFAULT_STORAGE,
    rank: int | None = None,
    report: Callable[[LayerScore], None] = lambda score: None,
) -> Scan:
    """Fit maps of a rank (`None`: full ones) for every candidate, and score them; `report` hears of each score.

    Layers are compared on `SCAN_TOKENS` tokens; the maps of the best are then fitted on all.
    """
    beginnings = [text[:-CONTINUATION_TOKENS] for text in held_out]
    rests = [text[-CONTINUATION_TOKENS:] for text in held_out]
    scores: list[LayerScore] = []
    best: tuple[LayerScore, MergedReader] | None = None
    few = first_tokens(texts, SCAN_TOKENS) if len(candidates) > 1 else list(texts)
    plain = reader_for(base, candidates[0])
    for group in _passes(base, plain, candidates):
        sums = fit(base, plain, few, group, storage_dtype)
        encoded = [encode(base, beginning, group, storage_dtype) for beginning in beginnings]
        for candidate in group:
            reader = reader_for(base, candidate, rank)
            explained = load_maps(reader, sums.pop(candidate))
            contexts = (read_context(reader, base.base_model, states[candidate][None]) for states in encoded)
            score = LayerScore(candidate, continuation_nll(base, contexts, rests), explained)
            report(score)
            scores.append(score)
            if math.isfinite(score.nll) and (best is None or score.nll < best[0].nll):
                best = score, reader
    if best is None:
        raise Diverged(
            "no layer's states give a finite likelihood: compute with --dtype fp32, or mend the base"
        )
    if few != list(texts):
        layers = best[0].layers
        load_maps(best[1], fit(base, best[1], texts, [layers], storage_dtype)[layers])
    return Scan(
        scores,
        prompted_nll=continuation_nll(base, beginnings, rests),
        unread_nll=continuation_nll(base, [[]] * len(rests), rests),
        tokens=sum(map(len, texts)),
        best=best[0],
        reader=best[1],
    )


def reader_for(base: PreTrainedModel, layers: Layers, rank: int | None = None) -> MergedReader:
    """A reader of these layers' states, its maps not yet fitted. Raises `DsskError` if the base cannot have one."""
    values = len(layers) * base.config.get_text_config().hidden_size
    if rank is not None and rank > values:
        raise DsskError(f"--rank {rank} is more than the {values} values of a state: lower it")
    try:
        reader = MergedReader(base.base_model, len(layers), rank).to(base.device)
        reader.find_rows(base.base_model)
    except ValueError as error:
        raise DsskError(str(error)) from error
    return reader


def calibrated(found: Scan, base: str | Path, **how: Any) -> Any:
    """The fused model that reads states of the best layer with its maps; `how` goes to `from_base`."""
    model = from_base(
        base,
        reader="merged",
        encode_layer=layers_name(found.best.layers, found.reader.num_layers),
        reader_rank=found.reader.rank,
        **how,
    )
    model.cross_attn_blocks[0].load_state_dict(found.reader.state_dict())
    return model


def encode(
    base: PreTrainedModel, text: Tokens, candidates: Sequence[Layers], storage_dtype: StorageDtype
) -> dict[Layers, torch.Tensor]:
    """The states (S, i) of a text, for each candidate, as they come back from a store."""
    wanted = sorted({layer for candidate in candidates for layer in candidate})
    states, _ = encode_states(base.base_model, torch.tensor([list(text)], device=base.device), None, wanted)
    parts = dict(zip(wanted, states[0].unflatten(-1, (len(wanted), -1)).unbind(1), strict=True))
    return {
        candidate: rounded(torch.cat([parts[layer] for layer in candidate], -1), storage_dtype)
        for candidate in candidates
    }


@torch.no_grad()
def continuation_nll(
    base: PreTrainedModel, contexts: Iterable[MergedContext | Tokens], rests: Sequence[Tokens]
) -> float:
    """Mean negative log-likelihood (nats a token) of the rests of texts after their beginnings.

    A beginning is a context that was read, or tokens for the base to read. The very first token of a rest is not
    scored, as nothing in the decoder stands before it.
    """
    total, count = 0.0, 0
    for context, rest in zip(contexts, rests, strict=True):
        text = torch.tensor([list(rest)], device=base.device)
        if isinstance(context, MergedContext):
            logits = base(text, **arguments(base, context, None, 1, len(rest))).logits
        else:
            whole = torch.tensor([[*context, *rest]], device=base.device)
            logits = base(whole, use_cache=False).logits[:, len(context) :]
        total += nn.functional.cross_entropy(logits[0, :-1].float(), text[0, 1:], reduction="sum").item()
        count += len(rest) - 1
    return total / count


def divided(texts: Sequence[Tokens], held_out: int) -> tuple[list[Tokens], list[Tokens]]:
    """Texts to fit the maps on, and at most `held_out` long enough ones to score them, spread over all of them.

    Raises `DsskError` where there are too few.
    """
    long = [number for number, text in enumerate(texts) if len(text) >= SHORTEST_TEXT]
    if len(long) < 2 or len(texts) < 4:
        raise DsskError(
            f"got {len(texts)} texts, of them {len(long)} with {SHORTEST_TEXT} tokens or more: want at least 4 and 2, "
            "some are held out to score the layers"
        )
    step = max(2, len(long) // held_out)
    chosen = set(long[::step][:held_out])
    return [t for n, t in enumerate(texts) if n not in chosen], [texts[n] for n in sorted(chosen)]


def _passes(
    base: PreTrainedModel, reader: MergedReader, candidates: Sequence[Layers]
) -> Iterator[list[Layers]]:
    """Candidates in groups whose sums fit into memory together."""
    width: int = base.config.get_text_config().hidden_size
    outputs = sum(mapped for mapped, _ in reader.widths)
    group: list[Layers] = []
    held = 0
    for candidate in candidates:
        inputs = len(candidate) * width
        needed = 4 * inputs * outputs + 8 * inputs**2
        if group and held + needed > MEMORY_BYTES:
            yield group
            group, held = [], 0
        group.append(candidate)
        held += needed
    yield group


def _batches(texts: Sequence[Tokens]) -> Iterable[list[Tokens]]:
    for rows in length_batches([len(text) for text in texts], BATCH_ROWS, BATCH_TOKENS):
        yield [texts[row] for row in rows]


@torch.no_grad()
def _observe(
    base: PreTrainedModel, reader: MergedReader, texts: Sequence[Tokens], wanted: Sequence[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The states (C, S, d) of each wanted layer, the outputs (C, S, o) to be mapped, and the mask (C, S)."""
    backbone = base.base_model
    ids = pad_tokens(texts, 0).to(base.device)
    mask = length_mask([len(text) for text in texts]).to(base.device)
    layers = find_layers(backbone, reader.num_layers)[1]
    states: dict[int, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    inner = [layer for layer in wanted if layer < reader.num_layers]
    with ExitStack() as stack:
        if inner:
            stack.enter_context(layer_inputs(layers, inner, states))
        mapped = [layers[layer] for layer in reader.mapped_layers]
        stack.enter_context(_projected(mapped, outputs))
        states[reader.num_layers] = backbone(
            ids, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state
    first, parts = 0, []
    for output, (width, _) in zip(outputs, reader.widths, strict=True):
        parts.append(output[..., reader.rows[first : first + width]])
        first += width
    return states, torch.cat(parts, -1), mask


@contextmanager
def _projected(layers: Sequence[nn.Module], outputs: list[torch.Tensor]) -> Iterator[None]:
    """Collect what each projection of keys and values gives, in the order of the reader's maps."""
    modules = [module for layer in layers for _, module in find_projections(layer)]
    found: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda *call, slot=slot: found.__setitem__(slot, call[2]))
        for slot, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    outputs.extend(found[slot] for slot in range(len(modules)))
