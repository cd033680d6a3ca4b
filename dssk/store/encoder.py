"""Encoding texts with a base model, alone or within a fused model, wherever it was saved."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import torch
from tqdm import tqdm

from dssk import prompts
from dssk.data.encode import Batch, Encoder, batch_slices, one_thread
from dssk.errors import DsskError
from dssk.inference.answering import tokenize_context
from dssk.inference.base import load_base, load_base_config
from dssk.inference.fingerprint import model_fingerprint, tokenizer_hash
from dssk.inference.loading import load_model
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.configuration import CrossAttnGPTBigCodeConfig
from dssk.store import format as store

BATCH_SIZE, BATCH_TOKENS = 32, 16384


def describe_encoding(
    model: str, revision: str | None, storage_dtype: store.StorageDtype, maximum_input_length: int | None
) -> dict[str, Any]:
    """The fields of `store.Encoding` for what `model`, a base or a fused model, will encode.

    `maximum_input_length` is the number of its positions if not given.
    """
    config = load_base_config(model, revision, fused=True)
    longest = maximum_input_length or config.n_positions
    if longest > config.n_positions:
        raise DsskError(
            f"maximum_input_length is {longest}, more than the {config.n_positions} positions of {model}: lower it"
        )
    return dict(
        model_id=model,
        model_revision=getattr(config, "_commit_hash", None),
        model_fingerprint=model_fingerprint(model, config, revision),
        tokenizer_hash=tokenizer_hash(load_tokenizer(model, revision)),
        hidden_size=config.n_embd,
        model_dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        storage_dtype=storage_dtype,
        template_version=prompts.TEMPLATE_VERSION,
        maximum_input_length=longest,
    )


class TextEncoder:
    """The model that made the encodings of a library, loaded from `path`."""

    def __init__(self, encoding: store.Encoding, path: str, revision: str | None):
        store.check_model(encoding, path, revision)
        dtype = getattr(torch, encoding.model_dtype)
        if isinstance(load_base_config(path, revision, fused=True), CrossAttnGPTBigCodeConfig):
            model = load_model(path, dtype=dtype)[0]
        else:
            model = load_base(path, revision, dtype=dtype)
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = load_tokenizer(path, revision)
        self._longest = encoding.maximum_input_length
        self._storage_dtype = cast(store.StorageDtype, encoding.storage_dtype)
        self._encoder = Encoder(self._model, self._storage_dtype)

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, pa.Array]]]:
        """Batches of about equal length, longest first: row numbers, and the columns of a segment that we make."""
        schema = store.context_features(self._storage_dtype).arrow_schema
        tokens = [tokenize_context(self._tokenizer, text) for text in texts]
        order = sorted(range(len(texts)), key=lambda row: -len(tokens[row]))
        lengths = [min(self._longest, len(tokens[row])) for row in order]
        with (
            tqdm(total=sum(lengths), desc="encoding", unit=" tokens", unit_scale=True, disable=None) as bar,
            one_thread(self._model.device),
        ):
            for cut in batch_slices(lengths, BATCH_SIZE, BATCH_TOKENS):
                rows = order[cut]
                batch = Batch(0, [texts[row] for row in rows], [tokens[row][: self._longest] for row in rows])
                record = self._encoder.record(batch, schema)
                truncated = pa.array([len(tokens[row]) > self._longest for row in rows], pa.bool_())
                yield rows, {"truncated": truncated, **dict(zip(schema.names, record.columns, strict=True))}
                bar.update(sum(lengths[cut]))
