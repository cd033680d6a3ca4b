"""Examples of unequal length -> one padded batch, with boolean masks as the only mark of padding."""

from itertools import groupby
from typing import Any

import torch

from dssk.inference.batching import length_mask, pack_states, pad_states, pad_tokens
from dssk.models.loss import IGNORED
from dssk.models.packing import groups_of


class Collator:
    """Batches examples of `CrossAttnDataset`: right-padded tokens, labels and contexts, left-padded teacher's texts.

    With `share_contexts`, a context of consecutive examples is in the batch once, if each is shared by equally many.
    """

    def __init__(self, pad_token_id: int, share_contexts: bool = False):
        self.pad_token_id = pad_token_id
        self.share_contexts = share_contexts

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = [e["input_ids"] for e in examples]
        batch = {
            "input_ids": pad_tokens(input_ids, self.pad_token_id),
            "attention_mask": length_mask([len(ids) for ids in input_ids]),
            "labels": pad_tokens([e["labels"] for e in examples], IGNORED),
        }
        if "contexts" in examples[0]:
            return batch | self._packed([e["contexts"] for e in examples])
        once = self._distinct(examples)
        if "context_input_ids" in examples[0]:
            contexts = [e["context_input_ids"] for e in once]
            batch["context_input_ids"] = pad_tokens(contexts, self.pad_token_id)
            batch["context_attention_mask"] = length_mask([len(ids) for ids in contexts])
        if "encoder_hidden_states" in examples[0]:
            states, mask = pad_states([e["encoder_hidden_states"] for e in once])
            batch["encoder_hidden_states"], batch["encoder_attention_mask"] = states, mask
        if "teacher_input_ids" in examples[0]:
            texts = [e["teacher_input_ids"] for e in examples]
            batch["teacher_input_ids"] = pad_tokens(texts, self.pad_token_id, left=True)
            batch["teacher_attention_mask"] = length_mask([len(ids) for ids in texts], left=True)
            batch["taught"] = torch.tensor([e["taught"] for e in examples])
            batch["teacher_share"] = torch.tensor([e["teacher_share"] for e in examples])
        return batch

    def _distinct(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One example of each context, if equally many share each: so the model finds their rows. Else all examples."""
        if not self.share_contexts:
            return examples
        runs = [list(run) for _, run in groupby(examples, key=_context)]
        return [run[0] for run in runs] if len({len(run) for run in runs}) == 1 else examples

    def _packed(self, examples: list[list[tuple[int, Any]]]) -> dict[str, torch.Tensor]:
        """The contexts of a batch, each there once, and which of them each row reads."""
        distinct = dict(pair for contexts in examples for pair in contexts)
        places = {number: place for place, number in enumerate(distinct)}
        groups = [[places[number] for number, _ in contexts] for contexts in examples]
        values = list(distinct.values())
        if not isinstance(values[0], torch.Tensor):
            return {
                "context_input_ids": pad_tokens(values, self.pad_token_id),
                "context_attention_mask": length_mask([len(ids) for ids in values]),
                "context_groups": groups_of(groups),
            }
        states, _, lengths, packed = pack_states(values, groups)
        return {"encoder_hidden_states": states, "context_lengths": lengths, "context_groups": packed}


def _context(example: dict[str, Any]) -> tuple[str, int]:
    """The identity of an example's context: its text, and how much of it is read."""
    read = example.get("encoder_hidden_states", example.get("context_input_ids"))
    return example["context"], len(read)  # type: ignore[arg-type]
