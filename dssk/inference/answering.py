"""Answers from contexts that are given as text, as encoder states, or projected ahead of time.

Each distinct context is encoded once, however many questions ask it, and questions that share one are generated
together from one projection of it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.errors import DsskError
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.cross_attention import ProjectedContext

if TYPE_CHECKING:
    from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM

MAX_NEW_TOKENS = 32
BATCH_SIZE = 32

Context = str | torch.Tensor  # a text, or its encoder states (S, d)
Contexts = Context | Sequence[Context] | None  # of one question; several are attended to together


@torch.no_grad()
def answer(
    model: "CrossAttnGPTBigCodeForCausalLM",
    questions: str | Sequence[str],
    contexts: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = BATCH_SIZE,
    show_progress: bool = False,
    **generate: Any,
) -> str | list[str]:
    """What `CrossAttnGPTBigCodeForCausalLM.answer` does."""
    if isinstance(questions, str):
        one = contexts if isinstance(contexts, ProjectedContext) else [contexts]
        return answer(model, [questions], one, tokenizer, batch_size, show_progress, **generate)[0]
    tokenizer = tokenizer or load_tokenizer(model.name_or_path)
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **generate,
    }
    if settings.get("num_return_sequences", 1) != 1:
        raise ValueError("answer gives one answer a question: use generate for num_return_sequences")
    prompt_ids = _tokenize(model, tokenizer, questions, settings["max_new_tokens"])
    projected = contexts if isinstance(contexts, ProjectedContext) else None
    per_question = _per_question(None if projected else contexts, len(questions))
    states = _states(model, tokenizer, per_question, batch_size)
    groups = _groups(states)
    answers = [""] * len(questions)
    bar = tqdm(
        total=len(questions), desc="answering", unit="question", disable=None if show_progress else True
    )
    with bar:
        for rows in _batches(states, groups, [len(ids) for ids in prompt_ids], batch_size):
            distinct = rows[:1] if len({groups[row] for row in rows}) == 1 else rows
            context = projected or _project(model, [states[row] for row in distinct])
            inputs = [torch.tensor(prompt_ids[row]) for row in rows]
            padded = pad_sequence(inputs, True, tokenizer.pad_token_id, "left")  # (B, T)
            mask = pad_sequence([torch.ones_like(ids) for ids in inputs], True, 0, "left")
            output = model.generate(
                padded.to(model.device), attention_mask=mask.to(model.device), context=context, **settings
            )
            new = tokenizer.batch_decode(output[:, padded.shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, new, strict=True):
                answers[row] = text.strip()
            bar.update(len(rows))
    return answers


def tokenize_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a context, as they are encoded; all of them."""
    return tokenizer(prompts.context(text), add_special_tokens=False)["input_ids"]


def tokenize_question(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """What the decoder reads before it answers."""
    return tokenizer(prompts.question(question), add_special_tokens=False)["input_ids"]


@torch.no_grad()
def encode_texts(
    model: "CrossAttnGPTBigCodeForCausalLM",
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = BATCH_SIZE,
) -> list[torch.Tensor]:
    """Encoder states (S, d) of each text; what does not fit into the model's positions is cut off."""
    tokens = [tokenize_context(tokenizer, text)[: model.config.max_position_embeddings] for text in texts]
    order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
    states: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = [torch.tensor(tokens[row], device=model.device) for row in rows]
        mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True)
        encoded, _ = model.encode(pad_sequence(inputs, batch_first=True), mask)
        states |= {row: encoded[i, : len(tokens[row])] for i, row in enumerate(rows)}
    return [states[row] for row in range(len(texts))]


def _tokenize(
    model: "CrossAttnGPTBigCodeForCausalLM",
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[list[int]]:
    window = model.config.max_position_embeddings
    tokens = [tokenize_question(tokenizer, question) for question in questions]
    for question, ids in zip(questions, tokens, strict=True):
        if len(ids) + max_new_tokens > window:
            raise DsskError(
                f"the question {question[:40]!r} has {len(ids)} tokens, with {max_new_tokens} new ones more than the "
                f"model's {window}: shorten it, or lower max_new_tokens"
            )
    return tokens


def _per_question(contexts: Any, count: int) -> list[list[Context]]:
    """The contexts of each of `count` questions as a list."""
    if contexts is None or isinstance(contexts, Context):
        contexts = [contexts] * count
    if len(contexts) != count:
        raise ValueError(
            f"got {count} questions and contexts for {len(contexts)}, want as many, or one for all"
        )
    return [[] if c is None else [c] if isinstance(c, Context) else list(c) for c in contexts]


def _states(
    model: "CrossAttnGPTBigCodeForCausalLM",
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[list[Context]],
    batch_size: int,
) -> list[list[torch.Tensor]]:
    """The encoder states of each question's contexts; each distinct text is encoded once."""
    texts = list(dict.fromkeys(c for several in contexts for c in several if isinstance(c, str)))
    encoded = dict(zip(texts, encode_texts(model, tokenizer, texts, batch_size), strict=True))
    return [[encoded[c] if isinstance(c, str) else c for c in several] for several in contexts]


def _groups(states: list[list[torch.Tensor]]) -> list[int]:
    """For each question a number that only those with the very same contexts share."""
    numbers: dict[tuple, int] = {}
    return [
        numbers.setdefault(tuple((s.data_ptr(), len(s)) for s in several), len(numbers)) for several in states
    ]


def _batches(
    states: list[list[torch.Tensor]], groups: Sequence[int], prompt_tokens: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Row numbers, at most `batch_size` at a time: longest contexts first, those of one context together.

    Rows with and without a context are never in one batch: without any, the model is the base.
    """
    tokens = [sum(map(len, several)) for several in states]
    order = sorted(range(len(states)), key=lambda i: (-tokens[i], groups[i], -prompt_tokens[i]))
    without = sum(count == 0 for count in tokens)
    for part in (order[: len(order) - without], order[len(order) - without :]):
        yield from (part[start : start + batch_size] for start in range(0, len(part), batch_size))


def _project(
    model: "CrossAttnGPTBigCodeForCausalLM", states: list[list[torch.Tensor]]
) -> ProjectedContext | None:
    """Contexts joined and projected: one for all rows of a batch, or one each; None if there are none."""
    if not states[0]:
        return None
    joined = [torch.cat([s.to(model.device) for s in several]) for several in states]
    mask = [torch.ones(len(s), dtype=torch.bool, device=model.device) for s in joined]
    return model.project_context(pad_sequence(joined, batch_first=True), pad_sequence(mask, batch_first=True))
