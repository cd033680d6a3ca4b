"""Model + rows -> answers, and how likely the model finds the right ones.

The two functions on batches serve every system that is compared: a fused model with its contexts, and a plain one
with prompts that hold theirs. Shapes: B rows, T tokens, S context tokens, d hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GPTBigCodeForCausalLM, PreTrainedTokenizerBase

from dssk import prompts
from dssk.data.collate import length_mask, pad_states, pad_tokens
from dssk.data.dataset import IGNORED
from dssk.inference.answering import MAX_NEW_TOKENS, tokenize_question

Contexts = Callable[[int], torch.Tensor | None]  # row number -> encoder states (S, d), or None for no context
Tokens = list[int]


def generate_answers(
    model: GPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Contexts,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to `questions`, each with its own context."""
    encoded = [tokenize_question(tokenizer, question) for question in questions]
    answers = [""] * len(questions)
    for rows in by_length([len(ids) for ids in encoded], batch_size, "answering"):
        context = context_batch(model, [contexts(i) for i in rows])
        texts = generate_batch(model, tokenizer, [encoded[i] for i in rows], max_new_tokens, **context)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def answer_nll(
    model: GPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    contexts: Contexts,
    batch_size: int,
) -> list[float]:
    """Negative log-likelihood of each gold answer and its end of text, in nats a token, teacher-forced."""
    prompted = [tokenize_question(tokenizer, question) for question in questions]
    targets = [answer_tokens(tokenizer, answer) for answer in answers]
    losses = [0.0] * len(questions)
    lengths = [len(p) + len(t) for p, t in zip(prompted, targets, strict=True)]
    for rows in by_length(lengths, batch_size, "scoring"):
        context = context_batch(model, [contexts(i) for i in rows])
        batch = nll_batch(
            model, tokenizer, [prompted[i] for i in rows], [targets[i] for i in rows], **context
        )
        for row, loss in zip(rows, batch, strict=True):
            losses[row] = loss
    return losses


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> Tokens:
    """What it should then write: the answer and the end of text."""
    return [
        *tokenizer(prompts.answer(answer), add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def generate_batch(
    model: GPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompted: Sequence[Tokens],
    max_new_tokens: int,
    prefixes: Sequence[Tokens] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Greedy answers to B prompts: the first line of each continuation.

    `prefixes` stand before the prompts, and `past_key_values` among `kwargs` holds what the model made of them,
    padded on the left. Other `kwargs` go to the model.
    """
    input_ids, mask = _pad_left(tokenizer, prefixes, prompted)
    generated = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **kwargs,
    )
    texts = tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].rstrip() for text in texts]


@torch.no_grad()
def nll_batch(
    model: GPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompted: Sequence[Tokens],
    targets: Sequence[Tokens],
    prefixes: Sequence[Tokens] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Mean negative log-likelihood of the tokens of B targets after their prompts, in nats a token."""
    # Padded on the left all targets end together, so only the last positions need logits.
    whole = [prompt + target for prompt, target in zip(prompted, targets, strict=True)]
    input_ids, mask = _pad_left(tokenizer, prefixes, whole)
    labels = pad_tokens(targets, IGNORED, left=True).to(model.device)
    known = max(map(len, prefixes)) if prefixes else 0  # positions that are in the cache
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids[:, known:].to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions[:, known:].to(model.device),
        logits_to_keep=labels.shape[1] + 1,
        **kwargs,
    ).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return [total / len(target) for total, target in zip(losses.sum(-1).tolist(), targets, strict=True)]


def _pad_left(
    tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[Tokens] | None, prompted: Sequence[Tokens]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and boolean mask; prefixes and prompts are padded apart, so that each group ends together."""
    groups = [group for group in (prefixes, prompted) if group]
    ids = [pad_tokens(group, tokenizer.pad_token_id, left=True) for group in groups]
    masks = [length_mask([len(tokens) for tokens in group], left=True) for group in groups]
    return torch.cat(ids, 1), torch.cat(masks, 1)


def context_batch(model: GPTBigCodeForCausalLM, states: Sequence[torch.Tensor | None]) -> dict[str, Any]:
    """The model's arguments for encoder states (S, d) of B rows; none for rows without a context."""
    present = [state for state in states if state is not None]
    if not present:
        return {}
    padded, mask = pad_states(present)
    return {"encoder_hidden_states": padded.to(model.device), "encoder_attention_mask": mask.to(model.device)}


def by_length(lengths: Sequence[int], batch_size: int, what: str) -> Iterator[list[int]]:
    """Row numbers in batches of about equal length, longest first: running out of memory shows at once.

    Progress is shown on a terminal.
    """
    batches = length_batches(lengths, batch_size)
    with tqdm(total=len(lengths), desc=what, unit="question", disable=None) as bar:
        for rows in batches:
            yield rows
            bar.update(len(rows))


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The batches of `by_length`: decided by the lengths alone."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
