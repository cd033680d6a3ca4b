"""Opening a store: its manifest, whose encodings it holds, and that its files are what was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from dssk import checkpoint
from dssk.errors import DamagedData, DsskError
from dssk.inference.fingerprint import is_model, tokenizer_hash
from dssk.inference.loading import load_base_config
from dssk.inference.tokenizer import load_tokenizer, template_version
from dssk.store import v01
from dssk.store.manifest import (
    FORMAT_VERSION,
    LAST_LAYER,
    MANIFEST,
    SPLITS,
    Encoding,
    FileInfo,
    Manifest,
    checked_json,
)
from dssk.utils import hashes
from dssk.utils.files import inside


def is_store(path: str | Path) -> bool:
    """Whether a folder is a finished store or a library."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, v01.LIBRARY))


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest. Raises `DsskError` if there is none, `DamagedData` if it was altered."""
    folder = Path(path)
    if not is_store(folder):
        remedy = (
            "it is unfinished, start the command that began it again" if folder.is_dir() else "no such folder"
        )
        raise DsskError(f"no encoded contexts in {path}: {remedy}")
    file = folder / (MANIFEST if (folder / MANIFEST).is_file() else v01.LIBRARY)
    try:
        return _parse(file, file.read_bytes())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedData(f"{file} is damaged and cannot be read: {repair(path)}") from error


def _parse(file: Path, raw: bytes) -> Manifest:
    version = from_json(raw).get("format_version")
    if version not in (FORMAT_VERSION, v01.FORMAT_VERSION):
        raise DsskError(
            f"{file} has format version {str(version)[:20]}, this dssk reads {FORMAT_VERSION}: encode again"
        )
    if file.name == v01.LIBRARY:
        return v01.convert_library(from_json(raw))
    if version == v01.FORMAT_VERSION:
        return v01.convert_store(checked_json(raw))
    return Manifest.from_file(raw)


def repair(path: str | Path) -> str:
    """The advice in messages about damage."""
    if any((Path(path) / split).is_dir() for split in SPLITS):
        return f"run `dssk verify {path} --discard`, then the preprocessing command again"
    return "bring it back from a copy, or begin the library anew"


def check_model(
    encoding: Encoding, model_path: str | Path, revision: str | None = None, encode_layer: str = LAST_LAYER
) -> None:
    """Raise `DsskError` unless `model_path`, a base or a fused model, made the encodings. Loads no weights.

    `encode_layer` is the one whose states are to be read. A store of texts only suits every model.
    """
    if encoding.storage_dtype is None:
        return
    config: Any = load_base_config(model_path, revision, fused=True)
    tokenizer = load_tokenizer(model_path, revision)
    width = encoding.hidden_size // (encoding.encode_layer.count("+") + 1)
    if config.hidden_size != width:
        difference = f"hidden size {width}, not {config.hidden_size}"
    elif tokenizer_hash(tokenizer) != encoding.tokenizer_hash:
        difference = "another tokenizer"
    elif encoding.model_fingerprint != _trained_on(model_path) and not is_model(
        encoding.model_fingerprint, model_path, config, revision
    ):
        difference = "other weights"
    elif template_version(tokenizer) != encoding.template_version:
        raise DsskError(
            f"contexts were encoded with prompt template {encoding.template_version}, this dssk uses "
            f"{template_version(tokenizer)}: encode them again into another folder"
        )
    elif encoding.encode_layer != encode_layer:
        raise DsskError(
            f"contexts were encoded by layer {encoding.encode_layer}, the model reads layer {encode_layer}: encode "
            "them again into another folder"
        )
    else:
        return
    raise DsskError(
        f"contexts were encoded by {encoding.model_id} ({difference}), the model is {model_path}: train that model, "
        "or encode the contexts again with this one"
    )


def _trained_on(model_path: str | Path) -> str | None:
    """The fingerprint of the base that a fused model was trained on; in mixed precision its own weights are rounded."""
    folder = Path(model_path)
    known = (folder / checkpoint.MANIFEST).is_file()
    return checkpoint.load_manifest(folder).get("base_fingerprint") if known else None


def check_sizes(path: str | Path, manifest: Manifest) -> None:
    """Raise `DamagedData` if a file of the store is missing or has another size. Reads no contents."""
    for name, info in manifest.all_files.items():
        file = inside(Path(path), name)
        if found := _wrong_size(file, info):
            raise DamagedData(f"{file} {found}: {repair(path)}")


def verified(folder: Path, name: str, info: FileInfo) -> Path:
    """A file of the store, read whole the first time that it is asked for. Raises `DamagedData` if it is another."""
    file = inside(folder, name)
    if fault := find_fault(file, info):
        raise DamagedData(f"{file} {fault}: {repair(folder)}")
    return file


def find_fault(
    file: Path,
    info: FileInfo,
    progress: Callable[[int], object] = lambda num_bytes: None,
    checksum: Callable[..., str] = hashes.xxh3_128,
) -> str:
    """The fault of a file, "" if there is none; `checksum` may be `files.xxh3_128` to trust no cache."""
    try:
        return _wrong_size(file, info) or ("" if checksum(file, progress) == info.xxh3_128 else "was altered")
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _wrong_size(file: Path, info: FileInfo) -> str:
    try:
        num_bytes = file.stat().st_size
    except OSError:
        return "is missing"
    return "" if num_bytes == info.num_bytes else f"has {num_bytes} bytes, not {info.num_bytes}"
