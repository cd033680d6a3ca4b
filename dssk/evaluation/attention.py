"""Whether the blocks attended to the answer: one head, measured on many questions.

Shapes: N blocks, H heads, S context tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.evaluation.metrics import exact_match
from dssk.evaluation.questions import spread
from dssk.evaluation.scores import interval
from dssk.inference.attending import attend, borders
from dssk.inference.encoding import Encoder
from dssk.inference.loading import FusedModel
from dssk.inference.tokenizer import leading_ids

CHOOSING = 4  # every so many questions choose the best head, the others measure it
MAX_QUESTIONS = 500  # enough for an interval of 3 points


def answer_mask(tokenizer: PreTrainedTokenizerBase, context: str, answers: Sequence[str]) -> torch.Tensor:
    """(S,) boolean: which tokens of an encoded context belong to an occurrence of one of `answers`, in any case.

    A token that is only the space before it counts as well: the decoder's answers begin with one.
    """
    text = prompts.context(context)
    spans = [span for answer in answers for span in find_words(text, answer)]
    inside = [
        any((start < e and end > s) or (end == s and text[start:end].isspace()) for s, e in spans)
        for start, end in borders(tokenizer, text)
    ]
    return torch.tensor([False] * len(leading_ids(tokenizer)) + inside, dtype=torch.bool)


def find_words(text: str, words: str) -> list[tuple[int, int]]:
    """Start and end of every place where `words` stands in `text`, in any case, not inside a longer word."""
    if not words.strip():
        return []
    return [
        match.span()
        for match in re.finditer(rf"(?<!\w){re.escape(words.strip())}(?!\w)", text, re.IGNORECASE)
    ]


@dataclass(frozen=True)
class Evidence:
    """How often the best head attended to the answer: one head for all questions, chosen on other questions."""

    layer: int  # decoder layer of its block
    block: int  # counted from the lowest, as `Attention.weights` is
    head: int
    chosen_on: int  # questions that chose the head
    n: int  # questions that it was measured on
    share: float  # of n: the token most attended over the whole answer lies inside the answer
    low: float  # 95 % bootstrap interval of `share`, resampling contexts
    high: float
    share_first_token: float  # of n: the same for the position that predicts the answer's first token
    share_mass: float  # mean over n of the weight that lies inside the answer
    chance: float  # mean over n of the answer's share of the context's tokens


def evidence(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    predictions: Sequence[dict[str, Any]],
) -> Evidence | None:
    """Measure heads on the correctly answered span questions among `predictions` (the rows of predictions.jsonl).

    A question counts if its answer stands in the context, and at most `MAX_QUESTIONS` do, spread evenly. None if
    fewer than `CHOOSING` are left.
    """
    usable = [row for row in predictions if _is_usable(row)]
    rows = [usable[i] for i in spread(len(usable), MAX_QUESTIONS)]
    hits, first_hits, masses, chances, contexts = [], [], [], [], []
    encoder = Encoder(model, tokenizer)
    for row in tqdm(rows, desc="attention", unit="question", disable=None):
        (states,) = encoder.encode([row["context"]])
        # Cut as it was when answering: a state depends only on the tokens before it.
        states = states[: row.get("context_tokens")]
        mask = answer_mask(tokenizer, row["context"], row["answers"])[: len(states)]
        if not mask.any():  # its context was cut before the answer
            continue
        attention = attend(model, tokenizer, row["question"], row["with_context"]["prediction"], states)
        hits.append(mask[attention.most_attended()])
        first_hits.append(mask[attention.weights[:, :, 0].argmax(-1)])
        masses.append(attention.of_answer()[..., mask].sum(-1))
        chances.append(mask.float().mean().item())
        contexts.append(row["context"])
    if len(hits) < CHOOSING:
        return None
    return _measure(
        model.config.reading_layers,
        torch.stack(hits).numpy(),
        torch.stack(first_hits).numpy(),
        torch.stack(masses).numpy(),
        np.array(chances),
        contexts,
    )


def _is_usable(row: dict[str, Any]) -> bool:
    answer = row["with_context"]["prediction"]
    return (
        row.get("answer_class", "span") == "span"
        and bool(answer.strip())
        and exact_match(answer, row["answers"]) == 1
        and any(find_words(row["context"], gold) for gold in row["answers"])
    )


def _measure(
    layers: list[int],
    hits: np.ndarray,
    first_hits: np.ndarray,
    masses: np.ndarray,
    chances: np.ndarray,
    contexts: Sequence[str],
) -> Evidence:
    """From (questions, N, H) each to the best head and its shares."""
    choosing = np.arange(len(hits)) % CHOOSING == 0
    block, head = best_head(hits[choosing])
    measured = hits[~choosing, block, head].astype(float)
    groups = np.unique(np.array(contexts)[~choosing], return_inverse=True)[1]
    low, high = interval(measured.tolist(), groups.tolist())
    return Evidence(
        layer=layers[block],
        block=block,
        head=head,
        chosen_on=int(choosing.sum()),
        n=len(measured),
        share=round(measured.mean().item(), 4),
        low=low,
        high=high,
        share_first_token=round(first_hits[~choosing, block, head].mean().item(), 4),
        share_mass=round(masses[~choosing, block, head].mean().item(), 4),
        chance=round(chances[~choosing].mean().item(), 4),
    )


def best_head(hits: np.ndarray) -> tuple[int, int]:
    """(block, head) with the most hits in (questions, N, H)."""
    block, head = np.unravel_index(hits.mean(0).argmax(), hits.shape[1:])
    return int(block), int(head)
