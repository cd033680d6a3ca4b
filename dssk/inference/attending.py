"""The attention of an answer: weights from its tokens to the tokens of its contexts.

The answer, as a rule the model's own, is read teacher-forced: the weights at the position that predicts an answer's
token are those that token was chosen by. Shapes: N blocks, H heads, A answer tokens, S tokens of all contexts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.inference.generation import contexts_together
from dssk.inference.tokenizer import leading_ids, tokenize_answer, tokenize_question

SPAN_SHARE = 0.2  # of the greatest weight: neighbouring tokens with at least this belong to the attended span


@dataclass(frozen=True)
class Attention:
    """The attention of every head of every block while one answer was given."""

    weights: torch.Tensor  # (N, H, A, S) float32 on the CPU; each row over S sums to one
    layers: list[int]  # decoder layer of each block, lowest first
    answer_tokens: list[str]  # A texts

    def of_answer(self) -> torch.Tensor:
        """(N, H, S): the mean over the answer's tokens."""
        return self.weights.mean(2)

    def most_attended(self) -> torch.Tensor:
        """(N, H): for each head the context token it attended to most over the whole answer."""
        return self.of_answer().argmax(-1)


@torch.no_grad()
def attend(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str,
    states: torch.Tensor | Sequence[torch.Tensor],
) -> Attention:
    """The attention weights of every head on `states` (S, d), one encoded context, for each token of `answer`.

    Several contexts, which are read together, are one behind the other in the weights. With a merged reader these are
    the base's own heads, and the weights their shares among the contexts' tokens.

    The model is left as it was, its attention implementation included. `context_texts` cuts a context's text into the
    pieces that the weights belong to. Raises `ValueError` if the answer has no tokens.
    """
    prompt = tokenize_question(tokenizer, question, model.config.reader)
    *target, _ = tokenize_answer(tokenizer, answer)
    if not target:
        raise ValueError("an answer without tokens attends to nothing")
    several = [states] if isinstance(states, torch.Tensor) else states
    with _eager(model):
        outputs = model(
            torch.tensor([prompt + target[:-1]], device=model.device),
            output_attentions=True,
            logits_to_keep=1,
            **contexts_together(model, [several]),
        )
    merged = model.config.reader == "merged"
    found = outputs.attentions if merged else outputs.cross_attentions
    # Merged, the context stands before the text, and of a long one a sliding window has the end alone.
    text_tokens, tokens = len(prompt) + len(target) - 1, sum(map(len, several))
    on_context = [layer[0, ..., : layer.shape[-1] - text_tokens] if merged else layer[0] for layer in found]
    padded = [nn.functional.pad(layer, (tokens - layer.shape[-1], 0)) for layer in on_context]
    # The first token is predicted at the prompt's last position.
    weights = torch.stack([layer[:, len(prompt) - 1 :].float() for layer in padded])
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12) if merged else weights
    layers = model.config.reading_layers
    return Attention(weights.cpu(), layers, _pieces(tokenizer, prompts.answer(answer)))


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Eager attention is the only one that returns its weights."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def context_texts(tokenizer: PreTrainedTokenizerBase, context: str) -> list[str]:
    """The text of a context as it is encoded, cut into a piece for each of its tokens; joined they are that text.

    A character of several tokens stands with the last of them, the others are empty. So are special tokens.
    """
    leading = [""] * len(leading_ids(tokenizer))
    return leading + _pieces(tokenizer, prompts.context(context))


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return [text[start:end] for start, end in borders(tokenizer, text)]


def borders(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """The start and end of each token's piece of a text, in characters and without gaps."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = np.maximum.accumulate([0, *(start for start, _ in offsets[1:]), len(text)]).tolist()
    return list(zip(starts, starts[1:], strict=False))[: len(offsets)]


@dataclass(frozen=True)
class Seen:
    """The attention on one of several contexts: its share of the total, and its most attended span."""

    share: float  # 0 to 1, of the mean over heads and the answer's tokens
    start: int  # characters of the context's text: the span that was most attended to
    end: int


def seen(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str,
    contexts: Sequence[tuple[str, torch.Tensor]],
) -> list[Seen]:
    """The attention of an answer on each of its contexts, texts with their states; empty for an empty answer.

    Of a context whose text is not known (empty) there is only the share.
    """
    if not answer.strip() or not contexts:
        return []
    attention = attend(model, tokenizer, question, answer, [states for _, states in contexts])
    return seen_in(tokenizer, attention, contexts)


def seen_in(
    tokenizer: PreTrainedTokenizerBase, attention: Attention, contexts: Sequence[tuple[str, torch.Tensor]]
) -> list[Seen]:
    """The same for attention weights that are known already."""
    parts = attention.of_answer().mean((0, 1)).split([len(states) for _, states in contexts])
    spans = [_most_seen(tokenizer, text, part) for (text, _), part in zip(contexts, parts, strict=True)]
    return [Seen(round(float(part.sum()), 4), *span) for part, span in zip(parts, spans, strict=True)]


def _most_seen(tokenizer: PreTrainedTokenizerBase, text: str, weights: torch.Tensor) -> tuple[int, int]:
    """The span, in characters, of the most attended token of a text and its neighbours with enough weight.

    What stands before the text (special tokens, the prompt) is left out.
    """
    before = len(prompts.context(""))
    pieces = [(0, 0)] * len(leading_ids(tokenizer)) + borders(tokenizer, prompts.context(text))
    inside = [i for i, (_, end) in enumerate(pieces[: len(weights)]) if end > before]
    if not inside:
        return 0, 0
    best = max(inside, key=lambda i: float(weights[i]))
    least = SPAN_SHARE * float(weights[best])
    first = last = best
    while first - 1 in inside and float(weights[first - 1]) >= least:
        first -= 1
    while last + 1 in inside and float(weights[last + 1]) >= least:
        last += 1
    start, end = max(0, pieces[first][0] - before), max(0, pieces[last][1] - before)
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
