"""Encoding texts for a library with the model that it was begun with."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from tqdm import tqdm

from dssk.errors import DsskError
from dssk.inference.batching import length_batches
from dssk.inference.encoding import BATCH_SIZE, BATCH_TOKENS, Batch, Encoder, one_thread
from dssk.inference.fingerprint import model_fingerprint, tokenizer_hash
from dssk.inference.loading import device, load, load_base_config
from dssk.inference.rounding import StorageDtype
from dssk.inference.tokenizer import load_tokenizer, template_version, tokenize_contexts
from dssk.models.layers import LAST, named_layers
from dssk.models.shapes import window
from dssk.store.manifest import Encoding
from dssk.store.opening import check_model


class Encoded(NamedTuple):
    """Some of the texts that were given to `TextEncoder.encode`."""

    rows: list[int]  # which of them
    num_tokens: list[int]
    truncated: list[bool]
    states: torch.Tensor  # (tokens of all, hidden_size), as they are stored
    scale: torch.Tensor | None  # (tokens of all,)


def describe_encoding(
    model: str,
    revision: str | None,
    storage_dtype: StorageDtype | None,
    maximum_input_length: int | None,
    encode_layer: str = LAST,
) -> dict[str, Any]:
    """The fields of `Encoding` for what `model`, a base or a fused model, will encode.

    `maximum_input_length` is the number of its positions if not given; the type that it computes in is its own.
    """
    config: Any = load_base_config(model, revision, fused=True)
    longest = maximum_input_length or window(config)
    if longest > window(config):
        raise DsskError(
            f"maximum_input_length is {longest}, more than the {window(config)} positions of {model}: lower it"
        )
    tokenizer = load_tokenizer(model, revision)
    return dict(
        model_id=model,
        model_revision=getattr(config, "_commit_hash", None),
        model_fingerprint=model_fingerprint(model, config, revision),
        tokenizer_hash=tokenizer_hash(tokenizer),
        hidden_size=config.hidden_size * len(named_layers(encode_layer, config.num_hidden_layers)),
        encode_layer=encode_layer,
        model_dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        storage_dtype=storage_dtype,
        template_version=template_version(tokenizer),
        maximum_input_length=longest,
    )


class TextEncoder:
    """The model that made the encodings of a library, loaded from `path`."""

    def __init__(self, encoding: Encoding, path: str, revision: str | None):
        check_model(encoding, path, revision, encoding.encode_layer)
        dtype = getattr(torch, encoding.model_dtype)
        model, self.tokenizer = load(path, revision, dtype=dtype, device=device())
        self._longest = encoding.maximum_input_length
        storage_dtype = cast(StorageDtype, encoding.storage_dtype)
        layers = named_layers(encoding.encode_layer, model.config.num_hidden_layers)
        self._encoder = Encoder(model, self.tokenizer, storage_dtype, self._longest, layers)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return tokenize_contexts(self.tokenizer, list(texts))

    def encode(self, texts: Sequence[str], tokens: Sequence[list[int]]) -> Iterator[Encoded]:
        """Batches of about equal length, longest first."""
        cut = [ids[: self._longest] for ids in tokens]
        lengths = [len(ids) for ids in cut]
        with (
            tqdm(total=sum(lengths), desc="encoding", unit=" tokens", unit_scale=True, disable=None) as bar,
            one_thread(self._encoder.model.device),
        ):
            for rows in length_batches(lengths, BATCH_SIZE, BATCH_TOKENS):
                batch = Batch([texts[row] for row in rows], [cut[row] for row in rows])
                num_tokens = [lengths[row] for row in rows]
                truncated = [len(tokens[row]) > self._longest for row in rows]
                yield Encoded(rows, num_tokens, truncated, *self._encoder.quantized(batch))
                bar.update(sum(num_tokens))
