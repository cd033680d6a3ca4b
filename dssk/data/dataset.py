"""Encoded rows as training examples: what the decoder reads, what it must predict, what it attends to."""

from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.config import ExperimentConfig
from dssk.data.augment import FIM_PROB, REPETITION_TASKS, fill_in_the_middle
from dssk.errors import DsskError
from dssk.inference.batching import IGNORED
from dssk.inference.tokenizer import (
    fim_ids,
    leading_ids,
    tokenize,
    tokenize_answer,
    tokenize_context,
    tokenize_question,
)


def check_context_ids(cfg: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DsskError` if contexts shall be training texts and the tokenizer cannot mark their middle."""
    if cfg.include_context_ids and fim_ids(tokenizer) is None:
        raise DsskError(
            f"include_context_ids is true, but the tokenizer of {cfg.model_path} has no tokens for fill-in-the-middle "
            "(such as <fim_prefix>): set include_context_ids to false"
        )


class CrossAttnDataset(torch.utils.data.Dataset):
    """Rows of `load_rows` as examples; an example depends only on (seed, epoch, index), not on workers or order.

    An example is `input_ids` and `labels` (T,), and the context: its text `context`, and `encoder_hidden_states`
    (S, d), or `context_input_ids` (S,) with `encode_online`. In training with `include_context_ids` the rows are
    walked twice: first the questions with their answers, then the contexts themselves as text to be repeated.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        cfg: ExperimentConfig,
        training: bool,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.training = training
        self.epoch = 0
        self.with_contexts = training and cfg.include_context_ids
        check_context_ids(cfg, tokenizer)
        self.fim_markers = fim_ids(tokenizer) if self.with_contexts else None
        self.num_leading = len(leading_ids(tokenizer))

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations; the training loop calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.with_contexts else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index % len(self.rows)]
        rng = np.random.default_rng([self.cfg.seed, self.epoch, index])
        if index < len(self.rows):
            input_ids, labels = self._question(row, rng)
        else:
            input_ids = self._context(row, rng)
            labels = input_ids
        size = self.cfg.context_size
        example = {"input_ids": input_ids[:size], "labels": labels[:size], "context": row["context"]}
        if self.cfg.encode_online:
            example["context_input_ids"] = tokenize_context(self.tokenizer, row["context"])[:size]
        else:
            example["encoder_hidden_states"] = row["encoder_hidden_states"][:size]
        return example

    def _question(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        prompt = tokenize_question(self.tokenizer, row["question"])
        answer = tokenize_answer(self.tokenizer, row["answer"])
        if self.training and self.cfg.do_repetition_augmentations:
            answer += self._repetition(row, str(rng.choice(REPETITION_TASKS)))
        input_ids = prompt + answer
        return input_ids, input_ids if self.cfg.loss_on == "all" else [IGNORED] * len(prompt) + answer

    def _repetition(self, row: dict[str, Any], task: str) -> list[int]:
        text = {
            "question": row["question"],
            "answer": row["answer"],
            "both": f"{row['question']} {row['answer']}",
            "context": row["context"],
        }[task]
        return tokenize(self.tokenizer, prompts.repeat_task(task)) + tokenize_answer(self.tokenizer, text)

    def _context(self, row: dict[str, Any], rng: np.random.Generator) -> list[int]:
        tokens = tokenize_context(self.tokenizer, row["context"])
        if self.fim_markers is not None and rng.random() < FIM_PROB:
            # Cut first: what the size limit would cut off later must not be a marker.
            tokens = tokens[: self.cfg.context_size - len(self.fim_markers) - 1]
            leading, text = tokens[: self.num_leading], tokens[self.num_leading :]
            tokens = leading + fill_in_the_middle(text, rng, self.fim_markers)
        return [*tokens, self.tokenizer.eos_token_id]
