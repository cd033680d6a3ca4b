"""Recognising a model and a data file without reading all of them: a few milliseconds a gigabyte.

A fingerprint covers, for a model, the settings of its forward pass and for every tensor its name, type, shape and
4 KiB from its middle, whatever files the tensors lie in; a fused model has the fingerprint of its base. For a data
file it covers the size and blocks spread evenly
over it; a file of at most 16 MiB is covered whole.
"""

import json
from pathlib import Path
from typing import Any

import xxhash
from transformers import GPTBigCodeConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dssk.errors import DamagedData, DsskError
from dssk.models.modeling import is_cross_attn

_TENSOR_BYTES = 4096
_BLOCK_BYTES, _NUM_BLOCKS = 1 << 16, 256
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

_FORWARD_SETTINGS = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "vocab_size",
    "multi_query",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
)


def model_fingerprint(path: str | Path, config: GPTBigCodeConfig, revision: str | None = None) -> str:
    """What tells a base model from every other one, as 32 hex digits. Loads no weights."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([getattr(config, name, None) for name in _FORWARD_SETTINGS]).encode())
    for entry in sorted(entry for file in _weight_files(path, revision) for entry in _tensors(file)):
        digest.update(b"".join(entry))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer from every other one, as 32 hex digits: all that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
            content.pop(setting, None)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def file_fingerprint(path: Path) -> str:
    """What tells a data file from an altered one, as 32 hex digits."""
    num_bytes = path.stat().st_size
    digest = xxhash.xxh3_128(str(num_bytes).encode())
    with open(path, "rb") as file:
        if num_bytes <= _BLOCK_BYTES * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for block in range(_NUM_BLOCKS):
                file.seek(block * (num_bytes - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _weight_files(path: str | Path, revision: str | None) -> list[Path]:
    """The safetensors files of a model; those of a model on the Hub are fetched, as loading it would do."""

    def find(name: str) -> Path | None:
        found = cached_file(str(path), name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    try:
        if single := find("model.safetensors"):
            return [single]
        if index := find("model.safetensors.index.json"):
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            shards = [find(name) for name in names]
            if all(shards):
                return [shard for shard in shards if shard]
    except (OSError, ValueError, KeyError) as error:
        raise DsskError(f"cannot read the weights of {path}: {str(error).splitlines()[0]}") from error
    raise DsskError(f"no complete safetensors weights at {path}: convert or fetch the model again")


def _tensors(path: Path) -> list[tuple[bytes, bytes, bytes]]:
    """(name, type and shape, bytes from its middle) of every tensor in a safetensors file."""
    num_bytes = path.stat().st_size
    entries = []
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise DamagedData(f"{path} is damaged: not a safetensors file: fetch it again")
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                if is_cross_attn(name):
                    continue
                start, end = tensor["data_offsets"]
                if 8 + header_bytes + end > num_bytes:
                    raise DamagedData(
                        f"{path} is damaged: {num_bytes} bytes, too short for {name}: fetch it again"
                    )
                length = min(end - start, _TENSOR_BYTES)
                file.seek(8 + header_bytes + start + (end - start - length) // 2)
                described = json.dumps([tensor["dtype"], tensor["shape"]])
                entries.append((name.encode(), described.encode(), file.read(length)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedData(f"{path} is damaged: its header cannot be read: fetch it again") from error
    return entries
