"""Encoded rows as training examples: what the decoder reads, what it must predict, what it attends to."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dssk import prompts
from dssk.config import ExperimentConfig
from dssk.data.augment import FIM_PROB, REPETITION_TASKS, fill_in_the_middle
from dssk.data.distractors import Distractors, context_numbers
from dssk.errors import DsskError
from dssk.inference.tokenizer import (
    fim_ids,
    leading_ids,
    tokenize,
    tokenize_answer,
    tokenize_context,
    tokenize_question,
    tokenize_question_after_context,
)
from dssk.models.loss import IGNORED
from dssk.models.shapes import context_window, window
from dssk.store.dataset import StoredContexts


def check_context_ids(cfg: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DsskError` if contexts shall be training texts and the tokenizer cannot mark their middle."""
    if cfg.include_context_ids and fim_ids(tokenizer) is None:
        raise DsskError(
            f"include_context_ids is true, but the tokenizer of {cfg.model_path} has no tokens for fill-in-the-middle "
            "(such as <fim_prefix>): set include_context_ids to false"
        )


TUNED_SHARE = 0.5  # `_Text.share` of a tuned teacher in the tokens of an answer
SPLIT_FROM, SPLIT_TO = 0.25, 0.75  # between which shares of its tokens a document is divided


class _Text(NamedTuple):
    """The decoder's text of a row, and for distillation the text that a teacher reads after the context's."""

    input_ids: list[int]
    labels: list[int]
    seen: int | None = None  # tokens of the context that are read; None for all
    prompted: list[int] = []  # the teacher's text
    taught: int = 0  # number of tokens at the end of both texts whose targets come from the teacher
    share: float = 0.0  # weight of the teacher's distribution in these targets; the label has the rest


class CrossAttnDataset(torch.utils.data.Dataset):
    """Rows of `load_rows` as examples, which depend only on (seed, epoch, index), not on workers or order: with
    distractors of the source `batch` on the indices of the batch, too.

    An example is `input_ids` and `labels` (T,), and the context: its text `context`, and `encoder_hidden_states`
    (S, d), or `context_input_ids` (S,) with `encode_online`. Where questions read several, it is `contexts`: the number
    of each and the same of it. In training the rows are walked once for each of `kinds`: questions with their answers;
    documents, whose beginning is the context and whose rest is the text (`train_on`); contexts themselves as text to be
    repeated (`include_context_ids`). With `distill` there is what a `Teacher` needs.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        cfg: ExperimentConfig,
        training: bool,
        contexts: StoredContexts | None = None,
        config: PreTrainedConfig | None = None,
    ):
        """`contexts` are those of the store; needed if questions read several.

        By the model's `config` a text behind a merged reader's context is cut to the positions that are left.
        """
        self.rows = rows
        self.contexts = contexts
        size = cfg.context_size
        self.context_size, self.positions = size, 2 * size  # of a context; of it and the text behind it
        if config is not None and cfg.reader == "merged":
            self.context_size, self.positions = min(size, context_window(config)), window(config)
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.training = training
        self.epoch = 0
        self.kinds = kinds_of_rows(cfg) if training else ["questions"]
        self.distils = training and cfg.distill is not False
        check_context_ids(cfg, tokenizer)
        self.fim_markers = fim_ids(tokenizer) if "contexts" in self.kinds else None
        self.num_leading = len(leading_ids(tokenizer))
        self.distractors: Distractors | None = None
        if cfg.several_contexts:
            assert contexts is not None
            self.distractors = Distractors.of_split(rows, contexts, cfg.distractors)
            self.own_contexts = context_numbers(rows)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations and contexts; the training loop calls this."""
        self.epoch = epoch
        self.num_contexts = self.contexts_of_epoch(epoch)

    def warming_up(self, epoch: int) -> bool:
        """Whether questions still read their own contexts alone; only training warms up."""
        return self.training and epoch < self.cfg.contexts_warmup

    def contexts_of_epoch(self, epoch: int) -> np.ndarray:
        """How many contexts each question reads."""
        low, high = (1, 1) if self.warming_up(epoch) else self.cfg.contexts_range
        return np.random.default_rng([self.cfg.seed, epoch]).integers(low, high + 1, size=len(self.rows))

    def __len__(self) -> int:
        return len(self.rows) * len(self.kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The examples of a batch; torch's loaders ask for them together."""
        own: list[int] = []
        if self.distractors is not None:
            own = self.own_contexts[np.array(indices) % len(self.rows)].tolist()
        batch = list(dict.fromkeys(own))
        return [self._example(index, batch) for index in indices]

    def _example(self, index: int, batch: list[int]) -> dict[str, Any]:
        """`batch` has the numbers of the contexts of all its questions."""
        kind, number = divmod(index, len(self.rows))
        row = self.rows[number]
        rng = np.random.default_rng([self.cfg.seed, self.epoch, index])
        numbers: list[int] = []  # of the contexts, where there may be several
        if self.distractors is not None:
            row, numbers = self._with_others(self.kinds[kind], number, row, batch, rng)
        make = {"questions": self._question, "documents": self._document, "contexts": self._context}
        text: _Text = make[self.kinds[kind]](row, rng)
        example: dict[str, Any] = {"context": row["context"]}
        if numbers:
            example["contexts"] = [(number, self._numbered(number)) for number in numbers]
            longest = max(len(context) for _, context in example["contexts"])
            return example | self._cut(text, longest)
        context: Sequence[Any] = []
        if self.cfg.encode_online or self.distils:
            context = example["context_input_ids"] = self._read_tokens(row)[: text.seen]
        if not self.cfg.encode_online:
            context = row["encoder_hidden_states"][: self.context_size][: text.seen]
            example["encoder_hidden_states"] = context
        example |= self._cut(text, len(context))
        if self.distils:
            cut = len(text.input_ids) - len(example["input_ids"])
            example["teacher_input_ids"] = text.prompted[: len(text.prompted) - cut]
            example["taught"], example["teacher_share"] = max(0, text.taught - cut), text.share
        return example

    def _tokens(self, context: str) -> list[int]:
        return tokenize_context(self.tokenizer, context)[: self.context_size]

    def _read_tokens(self, row: dict[str, Any]) -> list[int]:
        """Of a row's context as much as is read: what a store cut off (`--truncate`) has no states."""
        tokens = self._tokens(row["context"])
        return tokens if self.cfg.encode_online else tokens[: len(row["encoder_hidden_states"])]

    def _cut(self, text: _Text, context_tokens: int) -> dict[str, list[int]]:
        """What the decoder reads and learns of a text behind a context."""
        size = min(self.cfg.context_size, self.positions - context_tokens)
        return {"input_ids": text.input_ids[:size], "labels": text.labels[:size]}

    def _numbered(self, number: int) -> Any:
        """A context by its number in the store: its states, or its tokens with `encode_online`."""
        assert self.contexts is not None
        if self.cfg.encode_online:
            return self._tokens(self.contexts.text(number))
        return self.contexts.states(number)[: self.context_size]

    def _with_others(
        self, kind: str, number: int, row: dict[str, Any], batch: list[int], rng: np.random.Generator
    ) -> tuple[dict[str, Any], list[int]]:
        """A row with the answer that it then has, and the numbers of the contexts that it reads."""
        distractors = self.distractors
        assert distractors is not None
        own, count = int(self.own_contexts[number]), int(self.num_contexts[number])
        if kind == "contexts":  # text to repeat
            return row, [own]
        if rng.random() < self.cfg.gold_missing and not self.warming_up(self.epoch):
            golds = row["answers"] or [row["answer"]]
            others = distractors.draw(own, row["question"], count, rng, golds, batch)
            if others:
                return {**row, "answer": prompts.NOT_IN_CONTEXT}, others
        return row, [own, *distractors.draw(own, row["question"], count - 1, rng, batch=batch)]

    def _question(self, row: dict[str, Any], rng: np.random.Generator) -> _Text:
        prompt = tokenize_question(self.tokenizer, row["question"], self.cfg.reader)
        answer = tokenize_answer(self.tokenizer, row["answer"])
        if self.training and self.cfg.do_repetition_augmentations:
            tasks = REPETITION_TASKS if self.distractors is None else REPETITION_TASKS[:-1]  # which context?
            answer += self._repetition(row, str(rng.choice(tasks)))
        input_ids = prompt + answer
        labels = input_ids if self.cfg.loss_on == "all" else [IGNORED] * len(prompt) + answer
        # A base that was never tuned does not know what an answer looks like.
        if not isinstance(self.cfg.distill, str):
            return _Text(input_ids, labels)
        asked = tokenize_question_after_context(self.tokenizer, row["question"])
        return _Text(input_ids, labels, prompted=asked + answer, taught=len(answer), share=TUNED_SHARE)

    def _document(self, row: dict[str, Any], rng: np.random.Generator) -> _Text:
        tokens = self._read_tokens(row)
        seen = round(rng.uniform(SPLIT_FROM, SPLIT_TO) * len(tokens))
        seen = min(max(seen, self.num_leading + 1), len(tokens) - 1)
        rest = tokens[seen:]
        return _Text(rest, rest, seen, prompted=rest, taught=len(rest) - 1, share=1.0)

    def _repetition(self, row: dict[str, Any], task: str) -> list[int]:
        text = {
            "question": row["question"],
            "answer": row["answer"],
            "both": f"{row['question']} {row['answer']}",
            "context": row["context"],
        }[task]
        return tokenize(self.tokenizer, prompts.repeat_task(task)) + tokenize_answer(self.tokenizer, text)

    def _context(self, row: dict[str, Any], rng: np.random.Generator) -> _Text:
        tokens = tokenize_context(self.tokenizer, row["context"])
        if self.fim_markers is not None and rng.random() < FIM_PROB:
            # Cut first: what the size limit would cut off later must not be a marker.
            tokens = tokens[: self.cfg.context_size - len(self.fim_markers) - 1]
            leading, text = tokens[: self.num_leading], tokens[self.num_leading :]
            tokens = leading + fill_in_the_middle(text, rng, self.fim_markers)
        tokens = [*tokens, self.tokenizer.eos_token_id]
        return _Text(tokens, tokens)


def kinds_of_rows(cfg: ExperimentConfig) -> list[str]:
    """The kinds of training rows, in their order within an epoch."""
    asked: list[str] = ["questions", "documents"] if cfg.train_on == "both" else [cfg.train_on]
    return [*asked, "contexts"] if cfg.include_context_ids else asked
