"""Examples of unequal length -> one padded batch, with boolean masks as the only mark of padding."""

from typing import Any

import torch

from dssk.inference.batching import IGNORED, length_mask, pad_states, pad_tokens


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
