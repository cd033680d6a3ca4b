"""Answers of a model without cross-attention: the context stands in the prompt, read anew or from a stored KV cache.

A prompt is `context: ... \n question: ... \n answer:`, or holds several contexts one behind the other. Of those the
question's own stays, and the others in their order as long as the answer has room within the model's positions; a
context that is too long alone is cut at its end. Shapes: L layers, K key/value heads, S tokens, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dssk import prompts
from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.predictions import ByControl, answer_trials
from dssk.evaluation.questions import Question, QuestionSet
from dssk.inference.generation import Tokens, generate_batch, nll_batch
from dssk.inference.tokenizer import (
    leading_ids,
    tokenize,
    tokenize_answer,
    tokenize_context,
    tokenize_further_context,
    tokenize_question_after_context,
)
from dssk.models.shapes import kv_cache_values, window
from dssk.utils import files
from dssk.utils.defaults import MAX_NEW_TOKENS


class Prompt(NamedTuple):
    """The two parts of a prompt, tokenized apart: what the model makes of the context serves every question."""

    context: Tokens
    question: Tokens
    was_cut: bool  # the context's end was left out
    left_out: int = 0  # number of contexts that did not fit

    @property
    def tokens(self) -> Tokens:
        return self.context + self.question


@dataclass(frozen=True)
class Several:
    """The contexts that questions read together, in place of their own alone."""

    texts: Mapping[str, Sequence[Sequence[str] | None]]  # by control and row; None for a row that has none
    shuffled: bool = False  # those that stay in a prompt stand there in another order


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    asked: Question,
    positions: int,
    new_tokens: int,
    several: Sequence[str] | None = None,
    order: np.random.Generator | None = None,
) -> Prompt:
    """The prompt for a question, with room for `new_tokens` after it in a model of so many positions.

    It holds the question's own context, or those of `several` that fit, in their order or one that `order` draws.
    """
    question = tokenize_question_after_context(tokenizer, asked.question)
    room = max(positions - len(question) - new_tokens, 0)
    if several is None:
        context, left_out = tokenize_context(tokenizer, asked.context), 0
    else:
        context, left_out = _together(tokenizer, several, asked.context, room, order)
    return Prompt(context[:room], question, len(context) > room, left_out)


def _together(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    own: str,
    room: int,
    order: np.random.Generator | None,
) -> tuple[Tokens, int]:
    """The tokens of those of the contexts that fit, one behind the other, and how many were left out."""
    further = [tokenize_further_context(tokenizer, text) for text in texts]
    pinned = texts.index(own) if own in texts else 0
    kept = fitting([len(tokens) for tokens in further], room - len(leading_ids(tokenizer)), pinned)
    first, *others = kept if order is None else order.permutation(kept).tolist()
    tokens = sum((further[i] for i in others), tokenize_context(tokenizer, texts[first]))
    return tokens, len(texts) - len(kept)


def fitting(lengths: Sequence[int], room: int, pinned: int) -> list[int]:
    """Indices of the parts that fit into `room` tokens: `pinned` always, then the others in their order."""
    order = [pinned, *(place for place in range(len(lengths)) if place != pinned)]
    ends = np.cumsum([lengths[place] for place in order])
    return sorted(order[: max(1, int((ends <= room).sum()))])


def few_shot(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Question]) -> Tokens:
    """Few-shot examples, which go before a prompt: questions with their contexts and answers."""
    return [
        token
        for row in examples
        for part in (
            tokenize_context(tokenizer, row.context),
            tokenize_question_after_context(tokenizer, row.question),
            tokenize(tokenizer, prompts.worked_answer(row.answers[0])),
        )
        for token in part
    ]


class PromptedSystem:
    """A plain model that reads context and question anew for every answer.

    Questions are put with their own contexts, or under each control of `several` with those that it gives them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: QuestionSet,
        max_new_tokens: int = MAX_NEW_TOKENS,
        examples: Sequence[Question] = (),
        several: Several | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.targets = [tokenize_answer(tokenizer, row.answers[0]) for row in questions.rows]
        positions = window(model.config)
        before = few_shot(tokenizer, examples)

        def prompt(row: int, texts: Sequence[str] | None) -> Prompt:
            order = by_number.shuffled(len(texts), row) if texts and several and several.shuffled else None
            room = max(max_new_tokens, len(self.targets[row]))
            made = make_prompt(tokenizer, questions.rows[row], positions - len(before), room, texts, order)
            return made._replace(context=before + made.context)

        self.trials: dict[str, Sequence[Prompt | None]] = (
            {"with_context": [prompt(row, None) for row in range(len(questions))]}
            if several is None
            else {
                control: [None if texts is None else prompt(row, texts) for row, texts in enumerate(of_rows)]
                for control, of_rows in several.texts.items()
            }
        )

    def prompts(self, control: str = "with_context") -> list[Prompt]:
        """The prompts of the questions to which a control applies."""
        return [prompt for prompt in self.trials[control] if prompt is not None]

    @property
    def num_cut(self) -> int:
        """How many prompts lost the end of their context."""
        return sum(prompt.was_cut for control in self.trials for prompt in self.prompts(control))

    def __call__(self, rows: list[int]) -> list[ByControl]:
        return answer_trials(self.trials, rows, self._answer)

    def _answer(self, rows: Sequence[int], chosen: Sequence[Prompt]) -> list[tuple[str, float]]:
        texts = generate_batch(
            self.model, self.tokenizer, max_new_tokens=self.max_new_tokens, **self._inputs(chosen)
        )
        targets = [self.targets[row] for row in rows]
        losses = nll_batch(self.model, self.tokenizer, targets=targets, **self._inputs(chosen))
        return list(zip(texts, losses, strict=True))

    def _inputs(self, chosen: Sequence[Prompt]) -> dict[str, Any]:
        return {"prompted": [prompt.tokens for prompt in chosen]}


class PrefixCachedSystem(PromptedSystem):
    """The same with a cache of every context, read from disk: its answers are those of `PromptedSystem`.

    Without a folder nothing is kept beyond a batch, whose questions then share what the model made of their contexts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: QuestionSet,
        folder: Path | None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        examples: Sequence[Question] = (),
        several: Several | None = None,
    ):
        super().__init__(model, tokenizer, questions, max_new_tokens, examples, several)
        self.cache = PrefixCache(model, folder)

    def _inputs(self, chosen: Sequence[Prompt]) -> dict[str, Any]:
        prefixes = [prompt.context for prompt in chosen]
        return {
            "prompted": [prompt.question for prompt in chosen],
            "prefixes": prefixes,
            "past_key_values": self.cache.load(prefixes),
        }


class PrefixCache:
    """Keys and values of contexts on disk, in the model's own type: a safetensors file each, made when first asked for.

    The folder must belong to one model. Without one, those of the contexts asked for last are held in memory.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None):
        if kv_cache_values(model.config) == 0:
            raise DsskError(
                f"a {model.config.model_type} model has no KV cache: leave prompted_prefix_cache out"
            )
        self.model = model
        self.folder = folder
        self._held: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        if folder is not None:
            files.make_folder(folder)

    def load(self, contexts: Sequence[Tokens]) -> DynamicCache:
        """The cache of B contexts, padded on the left; for `generate`, which extends it."""
        longest = max(map(len, contexts))
        if self.folder is None:
            asked = {tuple(context): context for context in contexts}
            self._held = {key: self._held.get(key) or self._make(context) for key, context in asked.items()}
        stored = [self._read(context) for context in contexts]
        keys, values = (
            torch.stack(
                [torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts], 1
            )
            for parts in zip(*stored, strict=True)
        )  # (L, B, K, longest, D)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key.to(self.model.device), value.to(self.model.device), layer)
        return cache

    def _read(self, context: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (L, K, S, D) of one context."""
        if self.folder is None:
            held = self._held[tuple(context)]
            return held["keys"], held["values"]
        path = self.path(context)
        if not path.exists():
            with files.atomic_file(path) as file:
                file.write(save(self._make(context)))
        with safe_open(path, "pt") as file:
            return file.get_tensor("keys"), file.get_tensor("values")

    def _make(self, context: Tokens) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            ids = torch.tensor([context], device=self.model.device)
            # Without a configuration the cache holds every token, also in layers that look back only so far.
            cache = DynamicCache()
            layers = self.model(
                ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).past_key_values.layers
        return {
            "keys": torch.cat([layer.keys for layer in layers]).cpu().contiguous(),
            "values": torch.cat([layer.values for layer in layers]).cpu().contiguous(),
        }

    def path(self, context: Tokens) -> Path:
        """The file of a context's cache."""
        assert self.folder is not None
        digest = xxhash.xxh3_128_hexdigest(torch.tensor(context).numpy().tobytes())
        return self.folder / f"{digest}.safetensors"


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values that a model keeps for a token, in its own type."""
    return kv_cache_values(model.config) * model.dtype.itemsize
