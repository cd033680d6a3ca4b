"""Checkpoint folders: writing and verifying them, finding the newest, and rotation.

A folder becomes a checkpoint by its manifest, written last: the step, the world size, the experiment, and bytes and
xxh3_128 of every other file. Without a manifest that fits, it does not exist for resuming, rotation and evaluation.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from transformers import PreTrainedModel

from dssk.config import faults
from dssk.errors import DamagedData, DsskError
from dssk.utils import files, hashes
from dssk.utils.json_files import read_json

MANIFEST = "dssk_manifest.json"
WEIGHTS_FILE = "model.safetensors"
FINAL = "final"  # the fused model at the end of training, below a run's folder
BEST = "best"  # the fused model of the best checkpoint
FORMAT_VERSION = 1


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    num_bytes: int = Field(ge=0)
    xxh3_128: str


class _Manifest(BaseModel):
    """The fields of a manifest that are read; of its facts, a fused model has only `step` and `experiment`."""

    model_config = ConfigDict(extra="allow", strict=True)

    format_version: int
    files: dict[str, _File]
    step: int | None = Field(None, ge=0)
    world_size: int | None = Field(None, ge=1)
    skip_steps: int | None = Field(None, ge=1)
    experiment: dict[str, Any] | None = None
    data: str | None = None
    base_fingerprint: str | None = None


def finish_checkpoint(folder: Path, facts: dict[str, Any]) -> int:
    """Declare a folder whole, with `facts` about it; returns its bytes. All is on the disk before the manifest is."""
    mode = files.public_mode()
    with files.machine_faults(folder):
        for name in _names(folder):
            (folder / name).chmod(mode)  # libraries write weights for their owner alone
        entries = {name: _flushed(folder / name) for name in _names(folder)}
    files.sync(folder)
    body = {"format_version": FORMAT_VERSION, **facts, "files": entries}
    files.write_json(folder / MANIFEST, {**body, "checksum": _checksum(body)})
    return sum(entry["num_bytes"] for entry in entries.values())


def _names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)


def _flushed(path: Path) -> dict[str, Any]:
    files.sync(path)
    return {"num_bytes": path.stat().st_size, "xxh3_128": files.xxh3_128(path)}


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole folder. Raises `DamagedData` if there is none, or one that was altered."""
    try:
        manifest = read_json(folder / MANIFEST, dict)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedData(f"{folder} is unfinished: it has no {MANIFEST}") from None
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise DamagedData(f"{folder / MANIFEST} is damaged: its checksum is another")
    try:
        checked = _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise DamagedData(
            f"{folder / MANIFEST} is damaged: {faults(error, _Manifest.model_fields)}"
        ) from None
    if checked.format_version != FORMAT_VERSION:
        raise DsskError(
            f"{folder} has format version {checked.format_version}, this dssk reads {FORMAT_VERSION}"
        )
    if strange := [name for name in checked.files if not files.is_plain(name)]:
        raise DamagedData(f"{folder / MANIFEST} is damaged: {strange[0]!r} is no name of a file")
    return manifest


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files were all read. Raises `DamagedData` for the first that was altered."""
    manifest = load_manifest(folder)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedData(f"{file} is missing")
        if file.stat().st_size != entry["num_bytes"]:
            raise DamagedData(f"{file} has {file.stat().st_size} bytes, not {entry['num_bytes']}")
        if hashes.xxh3_128(file) != entry["xxh3_128"]:
            raise DamagedData(f"{file} is damaged, its checksum is another")
    return manifest


class Writer:
    """Writes the files of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        with files.atomic_file(self.folder / name) as file:
            file.write(save(tensors, metadata={"format": "pt"}))

    def model(self, model: PreTrainedModel, tokenizer, weights: dict[str, torch.Tensor]) -> None:
        """The cross-attention weights alone, with all that `load_model` needs besides the base."""
        self.tensors(WEIGHTS_FILE, weights)
        config = copy.deepcopy(model.config)
        config.cross_attn_only = True
        config.architectures = [type(model).__name__]
        config.save_pretrained(self.folder)
        model.generation_config.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)


@contextlib.contextmanager
def write_checkpoint(folder: Path, facts: dict[str, Any], num_bytes: int) -> Iterator[Writer]:
    """Write a folder of about `num_bytes` that is whole when the block has ended, and gone if anything fails in it."""
    discard(folder)
    files.require_free(folder.parent, num_bytes, folder.name)
    files.make_folder(folder)
    try:
        with files.machine_faults(folder):
            yield Writer(folder)
        finish_checkpoint(folder, facts)
    except BaseException:
        with contextlib.suppress(OSError, DsskError):
            discard(folder)
        raise


def checkpoint_folder(savedir: Path, step: int) -> Path:
    """The folder of the checkpoint of an optimizer step."""
    return savedir / f"checkpoint-{step}"


def checkpoint_step(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name, -1 for any other folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoint_folders(savedir: Path) -> list[Path]:
    """Everything named like a checkpoint, whole or not, newest first: by step, as clocks go wrong."""
    folders = (folder for folder in savedir.glob("checkpoint-*") if checkpoint_step(folder) >= 0)
    return sorted(folders, key=checkpoint_step, reverse=True)


def newest_checkpoint(savedir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one is not.

    Raises `DamagedData` if there were finished ones and none is whole: starting afresh would hide that.
    """
    skipped: list[str] = []
    finished = False
    for folder in checkpoint_folders(savedir):
        try:
            verify_checkpoint(folder)
        except DamagedData as error:
            finished |= (folder / MANIFEST).exists()
            skipped.append(str(error))
        else:
            return folder, skipped
    if finished:
        raise DamagedData(
            f"no checkpoint of {savedir} is whole ({'; '.join(skipped)}): start afresh with -r 1"
        )
    return None, skipped


def latest_checkpoint(savedir: Path) -> Path | None:
    """The newest whole checkpoint of a run, by step."""
    return newest_checkpoint(savedir)[0]


def discard(folder: Path) -> None:
    """Remove a folder; its manifest goes first, so that what is left of it at any moment is no checkpoint."""
    files.remove(folder / MANIFEST)
    files.remove(folder)


def rotate(savedir: Path, keep: int, best: Path | None) -> None:
    """Keep the newest `keep` finished checkpoints and the best one; leftovers of unfinished ones go too."""
    finished = [folder for folder in checkpoint_folders(savedir) if (folder / MANIFEST).exists()]
    kept = {*finished[:keep], best}
    for folder in checkpoint_folders(savedir):
        if folder not in kept:
            discard(folder)
