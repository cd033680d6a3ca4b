"""Prompts -> answers, and how likely a model finds given ones.

Both functions serve every system: a fused model with its contexts, and a plain one with prompts that hold theirs.
Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dssk.errors import DsskError
from dssk.inference.batching import length_mask, pack_states, pad_states, pad_tokens
from dssk.models.loss import IGNORED
from dssk.models.merged import MergedContext
from dssk.models.modeling import CONTEXT_ARGUMENTS, CrossAttnForCausalLM
from dssk.models.shapes import window
from dssk.utils.defaults import MAX_NEW_TOKENS

Tokens = list[int]


class OwnSettings(GenerationConfig):
    """Settings to which a model's own file (generation_config.json) adds nothing.

    The penalties, beams or forced tokens that a base comes with would change what is scored, and beside what.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        # So `generate` of transformers 5 fills in what is not set, from the model's own settings (5.23:
        # `_prepare_generation_config`). A test would see it if it did otherwise.
        if defaults_only and allow_custom_entries:
            return {}
        return super().update(defaults_only, allow_custom_entries, **kwargs)


def greedy(max_new_tokens: int, **more: Any) -> OwnSettings:
    """The likeliest token at each step; `more` settings add to it or say otherwise."""
    settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    return OwnSettings(**settings | {"max_new_tokens": max_new_tokens} | more)


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompted: Sequence[Tokens],
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefixes: Sequence[Tokens] | None = None,
    **settings: Any,
) -> list[str]:
    """Answers to B prompts, greedy ones unless `settings`, which go to `generate`, say otherwise.

    What the model's own generation_config.json says does not count, for sampling neither: name all that is wanted.
    `prefixes` stand before the prompts, and `past_key_values` among `settings` holds what the model made of them,
    padded on the left. Behind a merged reader's context no more is generated than the model has positions.
    """
    check_context(model, settings)
    input_ids, mask = _pad_left(tokenizer, prefixes, prompted)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    given = settings.pop("generation_config", None)
    how = greedy(max_new_tokens, **ends | ({} if given is None else given.to_diff_dict()))
    more = how.update(**settings)
    if isinstance(context := settings.get("context"), MergedContext):
        left = positions_left(model, context, [len(tokens) + 1 for tokens in prompted])
        how.max_new_tokens = min(how.max_new_tokens, left + 1)
    generated = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        generation_config=how,
        **more,
    )
    texts = tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [answer_in(text) for text in texts]


def answer_in(generated: str) -> str:
    """The answer rule: the first line that is not empty. What follows it is no part of an answer, for anybody."""
    return generated.strip().partition("\n")[0].rstrip()


@torch.no_grad()
def nll_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompted: Sequence[Tokens],
    targets: Sequence[Tokens],
    prefixes: Sequence[Tokens] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Mean negative log-likelihood of the tokens of B targets after their prompts, in nats a token."""
    # Padded on the left all targets end together, so only the last positions need logits.
    whole = [prompt + target for prompt, target in zip(prompted, targets, strict=True)]
    check_context(model, kwargs)
    if isinstance(context := kwargs.get("context"), MergedContext):
        positions_left(model, context, list(map(len, whole)))
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


def context_batch(model: PreTrainedModel, states: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The model's arguments for encoder states (S, d) of B rows; none if there are none."""
    if not states:
        return {}
    padded, mask = pad_states([s.to(model.device) for s in states])
    return {"context": model.project_context(padded, mask)}


def contexts_together(model: PreTrainedModel, states: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
    """The same for several contexts a row, which are attended to together and in no order.

    A tensor that occurs more than once is projected once.
    """
    numbers: dict[int, int] = {}
    groups = [[numbers.setdefault(id(s), len(numbers)) for s in several] for several in states]
    distinct = {id(s): s for several in states for s in several}
    packed = pack_states([s.to(model.device) for s in distinct.values()], groups)
    return {"context": model.project_context(*packed)}


def check_context(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise `ValueError` for a context that the model would not look at: a plain one ignores it without a word."""
    given = [name for name in CONTEXT_ARGUMENTS if arguments.get(name) is not None]
    if given and not isinstance(model, CrossAttnForCausalLM):
        raise ValueError(f"got {given[0]} for a {type(model).__name__}, which has no blocks to read it with")


def positions_left(model: PreTrainedModel, context: MergedContext, text_tokens: Sequence[int]) -> int:
    """Positions that contexts and B texts of so many tokens leave. Raises `DsskError` if these are too long."""
    before, positions = context.lengths.cpu().expand(len(text_tokens)), window(model.config)
    taken = before + torch.tensor(text_tokens)
    if taken.max() > positions:
        row = int(taken.argmax())
        raise DsskError(
            f"a context of {before[row]} tokens and {text_tokens[row]} of a question and its answer are more than the "
            f"model's {positions} positions: cut contexts into shorter passages (--passage_tokens)"
        )
    return positions - int(taken.max())


def _pad_left(
    tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[Tokens] | None, prompted: Sequence[Tokens]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and boolean mask; prefixes and prompts are padded apart, so that each group ends together."""
    groups = [group for group in (prefixes, prompted) if group]
    ids = [pad_tokens(group, tokenizer.pad_token_id, left=True) for group in groups]
    masks = [length_mask([len(tokens) for tokens in group], left=True) for group in groups]
    return torch.cat(ids, 1), torch.cat(masks, 1)
