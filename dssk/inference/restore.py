"""A merged context as a file: an ordinary KV cache, for engines that know nothing of dssk.

`keys.N` and `values.N` of layer N are (contexts, key/value heads, tokens, head size), as transformers' caches hold
them; a context's tokens lie at the right end of its row. `mask` (contexts, tokens) says where there are tokens, and
`lengths` (contexts,) at which position a text goes on.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dssk.errors import DamagedData, DsskError
from dssk.models.merged import MergedContext
from dssk.utils.files import atomic_file, machine_faults

FORMAT = "dssk-kv-cache"
VERSION = "1"


def save_cache(context: MergedContext, path: Path, dtype: torch.dtype | None = None, **about: str) -> None:
    """Write a context, its keys and values in `dtype` if given; `about` goes into the file's metadata as it is."""
    tensors = {"mask": context.mask.cpu(), "lengths": context.lengths.cpu()}
    for index, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
        tensors[f"keys.{index}"] = keys.detach().to("cpu", dtype).contiguous()
        tensors[f"values.{index}"] = values.detach().to("cpu", dtype).contiguous()
    with atomic_file(path) as file:
        file.write(save(tensors, {"format": FORMAT, "version": VERSION, **about}))


def load_cache(path: Path) -> MergedContext:
    """The context that `save_cache` wrote. Raises `DsskError` for another file, `DamagedData` for a broken one."""
    if not path.is_file():
        raise DsskError(f"no file {path}: want one that dssk restore wrote")
    try:
        with machine_faults(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                raise DsskError(f"{path} is not a KV cache of version {VERSION} that dssk restore wrote")
            names = set(file.keys())
            layers = sum(name.startswith("keys.") for name in names)
            if names != {
                "mask",
                "lengths",
                *(f"{kind}.{n}" for kind in ("keys", "values") for n in range(layers)),
            }:
                raise DamagedData(f"{path} does not hold keys and values of every layer: restore it again")
            return MergedContext(
                tuple(file.get_tensor(f"keys.{n}") for n in range(layers)),
                tuple(file.get_tensor(f"values.{n}") for n in range(layers)),
                file.get_tensor("mask"),
                file.get_tensor("lengths"),
            )
    except SafetensorError as error:
        raise DamagedData(f"{path} is damaged: {error}: restore it again") from error
