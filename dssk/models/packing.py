"""Contexts packed one behind the other, each there once, and which of them each decoder row reads.

A batch of B questions about several contexts each names few distinct ones: they are loaded and projected once, without
padding, and every row then picks the tokens that it reads.

Shapes: C packed contexts of N tokens together, B decoder rows, M the most contexts of a row, L the most tokens of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Packing:
    """Where packed contexts lie, and who reads which.

    `groups` may be left out where each context is read by a row of its own.
    """

    lengths: torch.Tensor  # (C,) tokens of each context
    groups: torch.Tensor | None = None  # (B, M) numbers of the contexts of each row; -1: no more of them

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1:
            raise ValueError(f"context_lengths are {tuple(self.lengths.shape)}, want one for each context")
        if self.groups is not None and self.groups.ndim != 2:
            raise ValueError(f"context_groups are {tuple(self.groups.shape)}, want (rows, contexts of a row)")

    @property
    def rows(self) -> torch.Tensor:
        """`groups` (B, M), spelled out."""
        if self.groups is None:
            return torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        return self.groups

    def padded(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed states (1, N, d) in rows of their own (C, S, d), and the mask (C, S) of their tokens."""
        rows = pad_sequence(states[0].split(self.lengths.tolist()), batch_first=True)
        return rows, torch.arange(rows.shape[1], device=rows.device) < self.lengths[:, None]

    def positions(self) -> torch.Tensor:
        """(N,) the place of each token in its context, from 0."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(int(self.lengths.sum()), device=starts.device) - starts.repeat_interleave(
            self.lengths
        )

    def row_lengths(self) -> torch.Tensor:
        """(B, M) tokens of each context of a row, 0 where there is none."""
        return self.lengths[self.rows.clamp(min=0)] * (self.rows >= 0)

    def tokens_of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) which packed token stands where in a row, and a mask, False at padding.

        The contexts of a row lie in the order of its group, at the right end: next to a text that would follow.
        """
        ends = self.row_lengths().cumsum(1)  # (B, M)
        total = ends[:, -1:]
        width = int(total.max())
        place = torch.arange(width, device=ends.device) - (width - total)  # (B, L)
        visible = place >= 0
        place = place.clamp(min=0)
        which = torch.searchsorted(ends, place, right=True).clamp(max=ends.shape[1] - 1)
        within = place - (ends - self.row_lengths()).gather(1, which)
        starts = (self.lengths.cumsum(0) - self.lengths)[self.rows.clamp(min=0)].gather(1, which)
        return torch.where(visible, starts + within, 0), visible


def groups_of(several: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, M) from the numbers of the contexts of each row."""
    groups = torch.full((len(several), max(map(len, several))), -1)
    for row, numbers in zip(groups, several, strict=True):
        row[: len(numbers)] = torch.as_tensor(numbers)
    return groups


def picked_tokens(tensor: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B, K, L, D) of keys or values (1, K, N, D): in each row the tokens (B, L) that it names."""
    by_token = tensor.squeeze(0).transpose(0, 1)  # (N, K, D), as projections leave them in memory
    picked = by_token.index_select(0, tokens.flatten().to(tensor.device))
    return picked.view(*tokens.shape, *by_token.shape[1:]).transpose(1, 2)
