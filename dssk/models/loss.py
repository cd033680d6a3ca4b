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
IGNORED = -100  # label of a position that is not learned, as in all of transformers

Head = Callable[[torch.Tensor], torch.Tensor]  # states (N, d) -> logits (N, vocabulary)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of the tokens themselves -> of what each position is to predict; the last predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def next_token_loss(
    hidden_states: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    vocab_size: int,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of predicting `targets` (B, T; -100 = ignored) at each position, a scalar in fp32.

    `head` makes logits of `hidden_states` (B, T, d) at labelled positions only. The sum is divided by `num_items`, the
    labels of all micro-batches and ranks of an optimizer step, or by the labels of this batch.
    """
    labelled = targets != IGNORED
    states, targets = hidden_states[labelled], targets[labelled]  # (N, d), (N,)
    chunk = max(1, CHUNK_LOGITS // vocab_size)
    if len(targets) <= chunk:
        total = _summed_loss(states, head, targets, label_smoothing)
    else:  # each chunk's logits are thrown away and computed again in the backward pass
        total = sum(
            checkpoint(_summed_loss, s, head, t, label_smoothing, use_reentrant=False)
            for s, t in zip(states.split(chunk), targets.split(chunk), strict=True)
        )
    return total / (max(len(targets), 1) if num_items is None else num_items)


def _summed_loss(
    states: torch.Tensor, head: Head, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum", label_smoothing=label_smoothing)
