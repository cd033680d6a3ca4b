"""Encoding the texts of a library with the model that it is of."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import torch
from tqdm import tqdm

from dssk import prompts
from dssk.errors import DsskError
from dssk.inference.batching import length_batches
from dssk.inference.encoding import BATCH_SIZE, BATCH_TOKENS, Batch, Encoder, one_thread
from dssk.inference.fingerprint import model_fingerprint, tokenizer_hash
from dssk.inference.loading import device, load, load_base_config
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from dssk.models.shapes import window
from dssk.store import format as store


def describe_encoding(
    model: str, revision: str | None, storage_dtype: store.StorageDtype, maximum_input_length: int | None
) -> dict[str, Any]:
    """The fields of `store.Encoding` for what `model`, a base or a fused model, will encode.

    `maximum_input_length` is the number of its positions if not given.
    """
    config = load_base_config(model, revision, fused=True)
    longest = maximum_input_length or window(config)
    if longest > window(config):
        raise DsskError(
            f"maximum_input_length is {longest}, more than the {window(config)} positions of {model}: lower it"
        )
    return dict(
        model_id=model,
        model_revision=getattr(config, "_commit_hash", None),
        model_fingerprint=model_fingerprint(model, config, revision),
        tokenizer_hash=tokenizer_hash(load_tokenizer(model, revision)),
        hidden_size=config.hidden_size,
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
        model, self._tokenizer = load(path, revision, dtype=dtype, device=device())
        self._longest = encoding.maximum_input_length
        self._storage_dtype = cast(store.StorageDtype, encoding.storage_dtype)
        self._encoder = Encoder(model, self._tokenizer, self._storage_dtype, self._longest)

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], dict[str, pa.Array]]]:
        """Batches of about equal length, longest first: row numbers, and the columns of a segment that we make."""
        schema = store.context_features(self._storage_dtype).arrow_schema
        tokens = [tokenize_context(self._tokenizer, text) for text in texts]
        cut = [ids[: self._longest] for ids in tokens]
        lengths = [len(ids) for ids in cut]
        with (
            tqdm(total=sum(lengths), desc="encoding", unit=" tokens", unit_scale=True, disable=None) as bar,
            one_thread(self._encoder.model.device),
        ):
            for rows in length_batches(lengths, BATCH_SIZE, BATCH_TOKENS):
                batch = Batch([texts[row] for row in rows], [cut[row] for row in rows])
                record = store.encoded_record(*batch[:2], *self._encoder.quantized(batch), schema)
                truncated = pa.array([len(tokens[row]) > self._longest for row in rows], pa.bool_())
                yield rows, {"truncated": truncated, **dict(zip(schema.names, record.columns, strict=True))}
                bar.update(sum(lengths[row] for row in rows))
