"""The fused model of a checkpoint, base and blocks in one, as a folder."""

from pathlib import Path

from dssk.checkpoint import discard, finish_checkpoint, load_manifest
from dssk.errors import DsskError
from dssk.inference.loading import find_model, load_model
from dssk.utils import files


def export(checkpoint: Path, output: Path, base_model: str | None = None, base_only: bool = False) -> int:
    """Write the fused model of `checkpoint` to `output`, a new folder or an earlier export; returns its bytes.

    With `base_only` the plain base is taken out of it instead, as transformers alone can load it.
    """
    with files.only_writer(output):
        return _export(checkpoint, output, base_model, base_only)


def _export(checkpoint: Path, output: Path, base_model: str | None, base_only: bool) -> int:
    if output.exists() and not _is_export(output):
        raise DsskError(f"--output {output} exists and is no export: want a new folder")
    model, tokenizer = load_model(checkpoint, base_model=base_model)
    facts = {"base": True} if base_only else {"fused": True} | _origin(find_model(checkpoint))
    if base_only:
        model = model.plain_base()
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    files.require_free(output.parent, num_bytes, output.name)
    with files.atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        finish_checkpoint(folder, facts)
        discard(output)  # an older export
    return sum(entry["num_bytes"] for entry in load_manifest(output)["files"].values())


def _is_export(folder: Path) -> bool:
    try:
        manifest = load_manifest(folder)
    except DsskError:
        return False
    return bool(manifest.get("fused") or manifest.get("base"))


def _origin(folder: Path) -> dict:
    try:
        manifest = load_manifest(folder)
    except DsskError:  # a fused model of other origin
        return {}
    return {key: manifest[key] for key in ("step", "experiment", "base_fingerprint") if key in manifest}
