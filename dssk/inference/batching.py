"""Rows of unequal length: which go together, and how they become one padded tensor."""

from collections.abc import Sequence

import torch

from dssk.models.packing import groups_of


def length_batches(
    lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """Row numbers in batches of about equal length, longest first: running out of memory shows at once.

    A batch has at most `batch_size` rows and `batch_tokens` tokens, padding included; a longer row is one by itself.
    The lengths alone decide.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        size = batch_size
        if batch_tokens is not None:  # the first is the longest, so it decides the padded size
            size = max(1, min(batch_size, batch_tokens // max(lengths[order[start]], 1)))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad_tokens(sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Token ids of B rows as one (B, longest) tensor, padded with `value` on the right, or on the left."""
    longest = max(map(len, sequences))
    padded = torch.full((len(sequences), longest), value)
    for row, tokens in zip(padded, sequences, strict=True):
        if len(tokens):
            where = slice(longest - len(tokens), None) if left else slice(len(tokens))
            row[where] = torch.as_tensor(tokens)
    return padded


def length_mask(lengths: Sequence[int], left: bool = False) -> torch.Tensor:
    """(B, longest), True where a row of that length has a token."""
    longest = max(lengths)
    positions = torch.arange(longest)[None]
    counts = torch.as_tensor(lengths)[:, None]
    return positions >= longest - counts if left else positions < counts


def pad_states(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodings (S_i, d) of C contexts as one (C, S, d) tensor in their own dtype, and the mask (C, S)."""
    lengths = [len(s) for s in states]
    padded = states[0].new_zeros(len(states), max(lengths), states[0].shape[-1])
    for row, context in zip(padded, states, strict=True):
        row[: len(context)] = context
    return padded, length_mask(lengths).to(padded.device)


def pack_states(
    states: Sequence[torch.Tensor], groups: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor]:
    """The arguments of `project_context` for packed encodings (S_i, d), of which each row reads several.

    That is the states (1, N, d), no mask, their lengths, and `groups` as a tensor: the numbers of each row's contexts.
    """
    lengths = torch.tensor([len(s) for s in states], device=states[0].device)
    return torch.cat(list(states))[None], None, lengths, groups_of(groups).to(lengths.device)
