"""Sample answers for the page's browser, each with what the blocks attended to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk.evaluation.attention import answer_mask
from dssk.evaluation.metrics import exact_match
from dssk.evaluation.questions import spread
from dssk.inference.attending import attend, context_texts
from dssk.inference.encoding import Encoder
from dssk.inference.loading import FusedModel

SCALE = 10_000  # weights are kept as whole numbers,
KEPT = 32  # and at most so many for a token of an answer

Row = dict[str, Any]  # a line of predictions.jsonl


def is_right(row: Row) -> bool:
    """Whether the answer from the right context is an exact match."""
    return exact_match(row["with_context"]["prediction"], row["answers"]) == 1


def choose(predictions: Sequence[Row], count: int) -> list[Row]:
    """`count` rows in their order, spread evenly: half of them wrong ones, as far as there are as many."""
    wrong = [i for i, row in enumerate(predictions) if not is_right(row)]
    right = [i for i, row in enumerate(predictions) if is_right(row)]
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    picked = [wrong[i] for i in spread(len(wrong), num_wrong)]
    picked += [right[i] for i in spread(len(right), count - num_wrong)]
    return [predictions[i] for i in sorted(picked)]


def describe(row: Row) -> Row:
    """The part of a sample that needs no model: its texts, and whether it is right."""
    others = {
        name: cell["prediction"]
        for name, cell in row.items()
        if isinstance(cell, dict) and "prediction" in cell
    }
    return {
        "id": str(row["id"]),
        "question": row["question"],
        "context": row["context"],
        "gold": row["answers"],
        "answer": others.pop("with_context"),
        "others": others,
        "class": row.get("answer_class", ""),
        "right": is_right(row),
    }


def with_attention(model: FusedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Row]:
    """`describe` for each row, with its context cut into tokens and the weights of every head on them.

    Adds `tokens` (texts of the context that was encoded), `marked` (numbers of those that are an answer),
    `answer_tokens`, and `weights[block][head][answer token]`: head 0 is the mean of all heads, and each list holds
    token numbers and weights times `SCALE` in turn.
    """
    described = []
    encoder = Encoder(model, tokenizer)
    for row in tqdm(rows, desc="samples", unit="sample", disable=None):
        (states,) = encoder.encode([row["context"]])
        states = states[: row.get("context_tokens")]
        marked = answer_mask(tokenizer, row["context"], row["answers"])[: len(states)]
        sample = describe(row) | {
            "tokens": context_texts(tokenizer, row["context"])[: len(states)],
            "marked": marked.nonzero().flatten().tolist(),
            "answer_tokens": [],
            "weights": [],
        }
        if sample["answer"].strip():
            attention = attend(model, tokenizer, row["question"], sample["answer"], states)
            sample["answer_tokens"] = attention.answer_tokens
            heads = torch.cat([attention.weights.mean(1, keepdim=True), attention.weights], 1)
            sample["weights"] = [[[_sparse(row) for row in head] for head in block] for block in heads]
        described.append(sample)
    return described


def _sparse(weights: torch.Tensor) -> list[int]:
    """The greatest of (S,) weights, and not 0, as `[token, weight, token, weight, ...]`."""
    values, tokens = weights.topk(min(KEPT, len(weights)))
    scaled = (values * SCALE).round().int().tolist()
    pairs = [(token, value) for token, value in zip(tokens.tolist(), scaled, strict=True) if value]
    return [number for pair in pairs for number in pair]


def dense(sample: Row, block: int, head: int) -> np.ndarray:
    """The weights of one head as (answer tokens, context tokens), as far as they were kept."""
    weights = np.zeros((len(sample["answer_tokens"]), len(sample["tokens"])))
    for row, pairs in zip(weights, sample["weights"][block][head], strict=True):
        row[pairs[::2]] = np.array(pairs[1::2]) / SCALE
    return weights
