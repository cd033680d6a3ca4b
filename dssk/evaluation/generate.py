"""Model + rows -> answers, and how likely the model finds the right ones."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.data.collate import length_mask, pad_states, pad_tokens
from dssk.data.dataset import IGNORED
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM

MAX_NEW_TOKENS = 32

Contexts = Callable[[int], torch.Tensor | None]  # row number -> encoder states (S, d), or None for no context


def generate_answers(
    model: CrossAttnGPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Contexts,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to `questions`, each with its own context; `progress` is shown on a terminal."""
    encoded = [tokenizer(prompts.question(q), add_special_tokens=False)["input_ids"] for q in questions]
    answers = [""] * len(questions)
    for rows in _batches([len(ids) for ids in encoded], batch_size, "answering"):
        ids = [encoded[i] for i in rows]
        generated = model.generate(
            pad_tokens(ids, tokenizer.pad_token_id, left=True).to(model.device),
            attention_mask=length_mask([len(i) for i in ids], left=True).long().to(model.device),
            **_context_batch(model, contexts, rows),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = generated[:, max(map(len, ids)) :]
        for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[row] = text.strip()
    return answers


@torch.no_grad()
def answer_nll(
    model: CrossAttnGPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers: Sequence[str],
    contexts: Contexts,
    batch_size: int,
) -> list[float]:
    """Negative log-likelihood of each gold answer and its end of text, in nats a token, teacher-forced."""
    prompted = [tokenizer(prompts.question(q), add_special_tokens=False)["input_ids"] for q in questions]
    targets = [
        [*tokenizer(prompts.answer(a), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for a in answers
    ]
    lengths = [len(p) + len(t) for p, t in zip(prompted, targets, strict=True)]
    losses = [0.0] * len(questions)
    for rows in _batches(lengths, batch_size, "scoring"):
        # Padded on the left all answers end together, so only the last positions need logits.
        ids = pad_tokens([prompted[i] + targets[i] for i in rows], tokenizer.pad_token_id, left=True)
        labels = pad_tokens([targets[i] for i in rows], IGNORED, left=True).to(model.device)
        mask = length_mask([lengths[i] for i in rows], left=True).to(model.device)
        logits = model(
            ids.to(model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            **_context_batch(model, contexts, rows),
            logits_to_keep=labels.shape[1] + 1,
        ).logits[:, :-1]
        token_losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        for row, total in zip(rows, token_losses.sum(-1).tolist(), strict=True):
            losses[row] = total / len(targets[row])
    return losses


def _context_batch(
    model: CrossAttnGPTBigCodeForCausalLM, contexts: Contexts, rows: list[int]
) -> dict[str, Any]:
    states = [state for state in map(contexts, rows) if state is not None]
    if not states:
        return {}
    padded, mask = pad_states(states)
    return {"encoder_hidden_states": padded.to(model.device), "encoder_attention_mask": mask.to(model.device)}


def _batches(lengths: Sequence[int], batch_size: int, what: str) -> Iterator[list[int]]:
    """Row numbers in batches of about equal length, longest first: running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc=what, unit="question", disable=None) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))
