"""Contexts -> encoder states, by a base model alone or within a fused one: one way for all who need them.

Shapes: C contexts, S context tokens, d hidden size; "tokens" are those of all contexts of a batch, one after another.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dssk.errors import Diverged, EnvironmentFault
from dssk.inference.batching import length_batches, length_mask, pad_tokens
from dssk.inference.rounding import DEFAULT_STORAGE, StorageDtype, dequantize, quantize
from dssk.inference.tokenizer import tokenize_contexts
from dssk.models.layers import encode_states
from dssk.models.shapes import context_window

BATCH_SIZE, BATCH_TOKENS = 32, 16384  # of a batch that is encoded
_PAD_ID = 0  # padding is masked, so any token does
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # a bare RuntimeError in torch 2.13

Tokens = list[int]


class Batch(NamedTuple):
    """Contexts that go through the model together."""

    texts: Sequence[str]  # for messages
    input_ids: Sequence[Tokens]
    first_row: int | None = None  # number of the first in its data set, for messages

    def name(self, row: int) -> str:
        """The name of a context in messages."""
        number = "the context" if self.first_row is None else f"context {self.first_row + row}"
        return f"{number} ({self.texts[row][:40]!r})"

    def halves(self) -> tuple["Batch", "Batch"]:
        half = len(self.input_ids) // 2
        second = None if self.first_row is None else self.first_row + half
        return (
            Batch(self.texts[:half], self.input_ids[:half], self.first_row),
            Batch(self.texts[half:], self.input_ids[half:], second),
        )


class Encoder:
    """Encodes contexts with `model`, and rounds their states as a store of `storage_dtype` keeps them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        storage_dtype: StorageDtype = DEFAULT_STORAGE,
        maximum_input_length: int | None = None,
        layers: Sequence[int] | None = None,
    ):
        """Texts need the tokenizer; they are cut to `maximum_input_length` tokens, the model's window if not given.

        The states are those of `layers`, one behind the other; by default what a fused model reads, and the last
        layer's of a base.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.storage_dtype: StorageDtype = storage_dtype
        self.maximum_input_length = maximum_input_length or context_window(model.config)
        self.layers = tuple(getattr(model.config, "encode_layers", ()) if layers is None else layers)
        self.out_of_memory_splits = 0

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = BATCH_SIZE,
        input_ids: Sequence[Tokens] | None = None,
    ) -> list[torch.Tensor]:
        """The states (S, d) of each text, on the model's device; `input_ids` are its tokens if they are known."""
        if input_ids is None:
            assert self.tokenizer is not None
            input_ids = tokenize_contexts(self.tokenizer, texts) if texts else []
        cut = [ids[: self.maximum_input_length] for ids in input_ids]
        states: dict[int, torch.Tensor] = {}
        for rows in length_batches([len(ids) for ids in cut], batch_size, BATCH_TOKENS):
            batch = Batch([texts[row] for row in rows], [cut[row] for row in rows])
            values = dequantize(*self.quantized(batch))
            states |= zip(rows, values.split([len(ids) for ids in batch.input_ids]), strict=True)
        return [states[row] for row in range(len(cut))]

    def quantized(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states (tokens, d) of a batch as they are stored, and for int8 the scale of each (tokens,).

        Raises `Diverged` for a context that encodes to NaN or infinity.
        """
        values, scale = quantize(self._states(batch), self.storage_dtype)
        finite = (values if scale is None else scale[:, None]).isfinite().all(dim=1)
        if not finite.all():
            lengths = torch.tensor([len(ids) for ids in batch.input_ids])
            first_bad = int((~finite).nonzero()[0])
            row = int(torch.searchsorted(lengths.cumsum(0), first_bad, right=True))
            raise Diverged(
                f"{batch.name(row)} encodes to NaN or infinity as {self.storage_dtype}: try --dtype fp32, "
                "--storage_dtype fp32, or mend the model"
            )
        return values, scale

    def _states(self, batch: Batch) -> torch.Tensor:
        """(tokens, d); a batch that does not fit into memory is halved until it does."""
        mask = length_mask([len(ids) for ids in batch.input_ids]).to(self.model.device)  # (C, S)
        try:
            padded = pad_tokens(batch.input_ids, _PAD_ID).to(self.model.device)  # (C, S)
            return encode(self.model, padded, mask, self.layers)[mask]
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and _CPU_OUT_OF_MEMORY not in str(error):
                raise
            if len(batch.input_ids) == 1:
                raise EnvironmentFault(
                    f"out of memory on {batch.name(0)} alone, {len(batch.input_ids[0])} tokens: lower "
                    "--maximum_input_length, pass --dtype bf16, or take a device with more memory"
                ) from error
        self.out_of_memory_splits += 1
        torch.cuda.empty_cache()
        return torch.cat([self._states(half) for half in batch.halves()])


def encode(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, layers: Sequence[int] = ()
) -> torch.Tensor:
    """States (C, S, d x layers) of contexts (C, S) padded on the right; those at padding positions are meaningless."""
    return encode_states(model.base_model, input_ids, attention_mask, layers)[0]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one CPU thread inside the block; a GPU does not mind.

    The order of additions, and with it the last bit of a state, depends on the number of threads.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
