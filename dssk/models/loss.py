"""The next-token loss, computed only where a label is and without a full logits tensor."""

import torch
from torch.nn.functional import linear_cross_entropy


def next_token_loss(
    hidden_states: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of predicting `labels` (B, T; -100 = ignored) one token ahead.

    `hidden_states` (B, T, d) are projected by `head` (vocabulary, d) at labelled positions only, in chunks
    (`torch.nn.functional.linear_cross_entropy`). The sum is divided by `num_items`, the labels of all micro-batches
    and ranks of an optimizer step, or by the labels of this batch.
    """
    targets = labels[:, 1:]
    labelled = targets != -100
    states, targets = hidden_states[:, :-1][labelled], targets[labelled]  # (N, d), (N,)
    total = linear_cross_entropy(states, head, targets, reduction="sum", label_smoothing=label_smoothing)
    if num_items is None:
        return total / max(len(targets), 1)
    return total / num_items
