"""Examples of unequal length -> one padded batch, with boolean masks as the only mark of padding."""

from collections.abc import Sequence
from typing import Any

import torch

from dssk.data.dataset import IGNORED


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
    return padded, length_mask(lengths)


class Collator:
    """Batches examples of `CrossAttnDataset`: right-padded tokens, labels and contexts."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = [e["input_ids"] for e in examples]
        batch = {
            "input_ids": pad_tokens(input_ids, self.pad_token_id),
            "attention_mask": length_mask([len(ids) for ids in input_ids]),
            "labels": pad_tokens([e["labels"] for e in examples], IGNORED),
        }
        if "context_input_ids" in examples[0]:
            contexts = [e["context_input_ids"] for e in examples]
            batch["context_input_ids"] = pad_tokens(contexts, self.pad_token_id)
            batch["context_attention_mask"] = length_mask([len(ids) for ids in contexts])
        else:
            states, mask = pad_states([e["encoder_hidden_states"] for e in examples])
            batch["encoder_hidden_states"], batch["encoder_attention_mask"] = states, mask
        return batch
