"""The next-token loss, computed only where a label is and without a full logits tensor.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same in one call. Its chunked path was measured
1.2 to 6 times slower here at equal memory, knows no label smoothing, refuses autocast's mixed types and sums in
half precision; and it reads a head's weight, where heads have biases, soft caps and scales. Hence these few lines.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # logits that exist at a time: 134 MB of fp32
IGNORED = -100  # label of a position that is not learned or scored, as in all of transformers

Head = Callable[[torch.Tensor], torch.Tensor]  # states (N, d) -> logits (N, vocabulary)
SoftTargets = tuple[torch.Tensor, torch.Tensor]  # (B, T, k) tokens and their probabilities


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) shifted to the position that predicts them; the last position predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def next_token_loss(
    hidden_states: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    vocab_size: int,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    soft_targets: SoftTargets | None = None,
) -> torch.Tensor:
    """Cross-entropy of predicting `targets` (B, T; -100 = ignored) at each position, a scalar in fp32.

    `head` makes logits of `hidden_states` (B, T, d) at labelled positions only. The sum is divided by `num_items`, the
    labels of all micro-batches and ranks of an optimizer step, or by the labels of this batch. With `soft_targets` the
    target of a labelled position is this distribution over tokens in place of its one token.
    """
    labelled = targets != IGNORED
    wanted = (targets,) if soft_targets is None else soft_targets
    parts = [part[labelled] for part in (hidden_states, *wanted)]  # (N, d), and (N,) or twice (N, k)
    chunk = max(1, CHUNK_LOGITS // vocab_size)
    count = len(parts[0])
    if count <= chunk:
        total = _summed_loss(head, label_smoothing, *parts)
    else:  # each chunk's logits are thrown away and computed again in the backward pass
        total = sum(
            checkpoint(_summed_loss, head, label_smoothing, *chunks, use_reentrant=False)
            for chunks in zip(*(part.split(chunk) for part in parts), strict=True)
        )
    return total / (max(count, 1) if num_items is None else num_items)


def _summed_loss(
    head: Head,
    label_smoothing: float,
    states: torch.Tensor,
    targets: torch.Tensor,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    logits = head(states).float()
    if shares is None:
        return cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return -(shares * (logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True))).sum()
