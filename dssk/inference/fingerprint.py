"""Recognising a base model, a tokenizer and a data file, whatever their names and places are.

The fingerprint of a model covers the settings of its forward pass and every byte of its tensors, whatever files they
lie in: a fused model has that of its base. A weight file is read whole, once (`utils/hashes.py`).
"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dssk.errors import DamagedData, DsskError
from dssk.models.weights import is_cross_attn
from dssk.utils import hashes
from dssk.utils.files import is_plain
from dssk.utils.json_files import parse_json

VERSION = "2:"  # begins a fingerprint; what version 0.1 wrote begins without

_BLOCK_BYTES, _NUM_BLOCKS = 1 << 16, 256
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

# What says nothing about the states that a model computes.
_BOOKKEEPING = re.compile(
    r"_.*|dtype|torch_dtype|transformers_version|architectures|auto_map|model_type|id2label|label2id|problem_type"
    r"|.*_token_id|use_cache|output_.*|return_dict|initializer_range|.*_p?drop(out)?|tie_word_embeddings|name_or_path"
)
# Files of the Hub name tensors with or without what the causal model calls its decoder, and some hold what can be
# computed: masks, rotary frequencies, and a head that is tied to the embeddings.
_DECODER = re.compile(r"^(transformer|model|gpt_neox|backbone)\.")
_COMPUTED = re.compile(r"(^|\.)(masked_bias|inv_freq)$")
_HEAD = re.compile(r"^(lm_head|embed_out)\.weight$")


class Tensor(NamedTuple):
    """An entry of a safetensors file."""

    name: str
    dtype: str
    shape: list[int]
    start: int  # in the file
    end: int


def model_fingerprint(path: str | Path, config: PreTrainedConfig, revision: str | None = None) -> str:
    """The fingerprint of the base model at `path`, or of the base in a fused model there. Loads no weights."""
    tied = bool(getattr(config, "tie_word_embeddings", False))
    # a sum, as the order of tensors and their division into files do not matter
    total = sum(int(_file_digest(file, tied), 16) for file in _weight_files(path, revision)) % (1 << 128)
    settings = json.dumps(_forward_settings(config), sort_keys=True, default=str)
    return VERSION + xxhash.xxh3_128_hexdigest(f"{settings} {total:032x}".encode())


def is_model(
    fingerprint: str, path: str | Path, config: PreTrainedConfig, revision: str | None = None
) -> bool:
    """Whether a fingerprint, which version 0.1 may have written, is that of the base at `path`."""
    of_its_version = model_fingerprint if fingerprint.startswith(VERSION) else fingerprint_v01
    return of_its_version(path, config, revision) == fingerprint


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer, 32 hex digits: it covers all that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
            content.pop(setting, None)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def file_fingerprint(path: Path) -> str:
    """The fingerprint of a data file, 32 hex digits; of one above 16 MiB it covers evenly spread blocks."""
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


def _forward_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a base's family that differ from its defaults, and decide what it computes."""
    family: Any = next(cls for cls in type(config).__mro__ if cls.__module__.startswith("transformers."))
    defaults = _without_bookkeeping(family().to_dict())
    settings = _without_bookkeeping(config.to_dict())
    differ = {name: settings[name] for name in settings.keys() & defaults if settings[name] != defaults[name]}
    return {"family": family.model_type, **differ}


def _without_bookkeeping(values: dict[str, Any]) -> dict[str, Any]:
    return {
        str(name): _without_bookkeeping(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not _BOOKKEEPING.fullmatch(str(name))
    }


def _file_digest(path: Path, tied: bool) -> str:
    """The sum of the digests of a base's tensors in one file, as 32 hex digits."""
    return hashes.cached(f"tensors {VERSION} {tied}", path, lambda: _tensor_sum(path, tied))


def _tensor_sum(path: Path, tied: bool) -> str:
    tensors, total = list(_tensors(path)), 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for tensor in tensors:
            name = _DECODER.sub("", tensor.name)
            is_mask = name.endswith(".bias") and len(tensor.shape) == 4
            if is_mask or _COMPUTED.search(name) or (tied and _HEAD.match(name)):
                continue
            digest = xxhash.xxh3_128(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            with memoryview(content) as view, view[tensor.start : tensor.end] as values:
                digest.update(values)
            total += digest.intdigest()
    return f"{total % (1 << 128):032x}"


def _weight_files(path: str | Path, revision: str | None) -> list[Path]:
    """The safetensors files of a model; those of a model on the Hub are fetched, as loading it would do."""

    def find(name: str) -> Path | None:
        found = cached_file(str(path), name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    try:
        if single := find("model.safetensors"):
            return [single]
        if index := find("model.safetensors.index.json"):
            names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            if not all(map(is_plain, names)):
                raise DamagedData(f"{index} is damaged: it names files outside its folder: fetch it again")
            shards = [find(name) for name in names]
            if all(shards):
                return [shard for shard in shards if shard]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__} {error}".splitlines()[0]
        raise DsskError(f"cannot read the weights of {path}: {said}") from error
    raise DsskError(f"no complete safetensors weights at {path}: convert or fetch the model again")


def _tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file that belong to a base."""
    num_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise DamagedData(f"{path} is damaged: not a safetensors file: fetch it again")
        header = file.read(header_bytes)
    first = 8 + header_bytes
    try:
        entries = parse_json(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            if type(start) is not int or type(end) is not int or not 0 <= start <= end <= num_bytes - first:
                raise ValueError("a tensor lies outside the file")
            if not is_cross_attn(name):
                yield Tensor(name, entry["dtype"], list(entry["shape"]), first + start, first + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedData(f"{path} is damaged: its header cannot be read: fetch it again") from error


# --- what version 0.1 wrote --------------------------------------------------------------------------------------

_V01_TENSOR_BYTES = 4096
_V01_SETTINGS = (
    "n_layer n_head n_embd n_inner n_positions vocab_size multi_query activation_function layer_norm_epsilon "
    "scale_attn_weights attention_softmax_in_fp32 scale_attention_softmax_in_fp32"
)


def fingerprint_v01(path: str | Path, config: PreTrainedConfig, revision: str | None = None) -> str:
    """The fingerprint of version 0.1: of each tensor it covers 4 KiB from the middle alone."""
    digest = xxhash.xxh3_128(json.dumps([getattr(config, n, None) for n in _V01_SETTINGS.split()]).encode())
    for entry in sorted(entry for file in _weight_files(path, revision) for entry in _v01_entries(file)):
        digest.update(b"".join(entry))
    return digest.hexdigest()


def _v01_entries(path: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    with open(path, "rb") as file:
        for name, dtype, shape, start, end in _tensors(path):
            length = min(_V01_TENSOR_BYTES, end - start)
            file.seek(start + (end - start - length) // 2)
            yield name.encode(), json.dumps([dtype, shape]).encode(), file.read(length)
