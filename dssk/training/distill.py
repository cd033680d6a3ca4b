"""Distillation: a teacher that reads the context's text gives soft targets to a student that reads its states.

The teacher is the frozen base itself with the text in its prompt, or one that was tuned to answer so. Its most likely
tokens, with their probabilities, take the place of the labels: the student learns a distribution at each position. Any
text can be used: the beginning of a document is the context, the rest is to be predicted.

Shapes: B rows, C contexts (B is a multiple of C, rows of a context lie together), S context tokens, T tokens of the
student's text, P of the teacher's, n taught tokens at most, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from dssk.errors import DsskError
from dssk.models.loss import IGNORED, SoftTargets, shifted
from dssk.models.merged import MergedContext, accepts, arguments

TOP_TOKENS = 50  # most likely tokens of the teacher that are kept at each position
LOGITS_AT_A_TIME = 2**27  # of the teacher: 512 MiB in fp32
TEACHER_KEYS = ("teacher_input_ids", "teacher_attention_mask", "taught", "teacher_share")  # of a batch


class Teacher:
    """A plain model, of the student's family and tokenizer, that reads contexts as text."""

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model.eval().requires_grad_(False)

    @torch.no_grad()
    def soft_targets(self, batch: dict[str, torch.Tensor]) -> SoftTargets:
        """Tokens and probabilities (B, T, 1 + `TOP_TOKENS`) for a batch of the student; the first token is the label.

        Of the batch are needed: `context_input_ids` (C, S) and their mask; `labels` (B, T); `teacher_input_ids`
        (B, P), what the teacher reads after its context, padded on the left, and their mask; `taught` (B,), how many
        tokens at the end of both texts it teaches, and `teacher_share` (B,), what share of a target it decides there.
        """
        targets = shifted(batch["labels"])
        top = min(TOP_TOKENS, self.model.config.vocab_size)
        tokens = targets.clamp(min=0)[..., None].repeat(1, 1, 1 + top)
        shares = torch.zeros(tokens.shape, device=tokens.device)
        shares[..., 0] = 1
        where, ends = _taught(batch["taught"]), _lengths(batch["labels"])
        for contexts, rows in self._parts(batch, where.shape[1]):
            best = self._logits(batch, contexts, rows, where.shape[1]).topk(top)  # (rows, n, top)
            kept = where[rows]
            number, place = kept.nonzero().unbind(1)
            row = rows[number]
            # The token that is `back` tokens from the end of a text is predicted one position before it.
            back = kept.shape[1] - place
            position, share = ends[row] - back - 1, batch["teacher_share"][row, None]
            tokens[row, position, 1:] = best.indices[kept]
            shares[row, position, 1:] = share * best.values[kept].float().softmax(-1)
            shares[row, position, :1] = 1 - share
        return tokens, shares

    def _parts(
        self, batch: dict[str, torch.Tensor], count: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Numbers of contexts and of their rows that go through the teacher together: those with something taught."""
        contexts = len(batch["context_input_ids"])
        each = len(batch["labels"]) // contexts
        wanted = batch["taught"].view(contexts, each).any(-1).nonzero()[:, 0]
        size = max(1, LOGITS_AT_A_TIME // max(1, each * count * self.model.config.vocab_size))
        for part in wanted.split(size):
            if len(part):
                yield part, (part[:, None] * each + torch.arange(each, device=part.device)).flatten()

    def _logits(
        self, batch: dict[str, torch.Tensor], contexts: torch.Tensor, rows: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Logits (rows, n, V) of the last n tokens of each text after its context, which is read once for its rows.

        Padding between context and text uses up places of a sliding window, as in a merged reader's batches.
        """
        context = self._read(batch["context_input_ids"][contexts], batch["context_attention_mask"][contexts])
        text, mask = batch["teacher_input_ids"][rows], batch["teacher_attention_mask"][rows]
        given = arguments(self.model, context, mask, *text.shape)
        return self.model(text, **given, logits_to_keep=count + 1).logits[:, -count - 1 : -1]

    def _read(self, input_ids: torch.Tensor, mask: torch.Tensor) -> MergedContext:
        """Keys and values of contexts (C, S), padded on the right, in every layer."""
        order = mask.long().argsort(dim=-1, stable=True)  # padding first: texts follow the tokens
        input_ids, mask = input_ids.gather(1, order), mask.bool().gather(1, order)
        given = {}
        if accepts(self.model, "position_ids"):
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()  # without a configuration it keeps every token, also in layers with a window
        self.model.base_model(
            input_ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **given
        )
        layers: list[Any] = cache.layers
        if len(layers) != self.model.config.num_hidden_layers or not all(
            isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers
        ):
            raise DsskError(
                f"a {self.model.config.model_type} model keeps no keys and values in each layer: it cannot teach "
                "(distill)"
            )
        keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
        return MergedContext(keys, values, mask, mask.sum(-1))


def for_student(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch without what the teacher alone reads."""
    unused = {*TEACHER_KEYS}
    if "encoder_hidden_states" in batch:
        unused |= {"context_input_ids", "context_attention_mask"}
    return {name: value for name, value in batch.items() if name not in unused}


def _taught(counts: torch.Tensor) -> torch.Tensor:
    """(B, n): which of the last n tokens of each row are taught, of rows with so many."""
    most = int(counts.max())
    return torch.arange(most, device=counts.device) >= most - counts[:, None]


def _lengths(labels: torch.Tensor) -> torch.Tensor:
    """(B,) one past the position of the last label of each row (B, T)."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return (places * (labels != IGNORED)).amax(-1)
