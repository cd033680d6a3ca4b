"""Folders that hold a model: which are complete, which is newest, and loading one."""

import json
import re
from pathlib import Path

from dssk.errors import DamagedData, DsskError
from dssk.files import publish_json
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM
from dssk.tokenizer import load_tokenizer

MANIFEST = "dssk_manifest.json"
FINAL = "final"  # the fused model at the end of training, below a run's folder


def finish_checkpoint(folder: Path) -> None:
    """Declare a checkpoint complete; until then it does not exist for resuming and evaluating."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    publish_json(folder / MANIFEST, {"step": checkpoint_step(folder), "files": files})


def checkpoint_step(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name, -1 for any other folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def is_complete(folder: Path) -> bool:
    """Whether every file of the checkpoint's manifest is there with its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def latest_checkpoint(savedir: Path) -> Path | None:
    """The newest complete checkpoint of a run, by step."""
    folders = sorted(
        (f for f in savedir.glob("checkpoint-*") if checkpoint_step(f) >= 0), key=checkpoint_step
    )
    return next((folder for folder in reversed(folders) if is_complete(folder)), None)


def find_model(path: str | Path) -> Path:
    """The folder to load for a checkpoint, a fused model, or a run's folder (its final model, else its newest)."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / FINAL / "config.json").is_file():
        return folder / FINAL
    if newest := latest_checkpoint(folder):
        return newest
    runs = [run for run in folder.glob("*") if latest_checkpoint(run)] if folder.is_dir() else []
    if len(runs) == 1:
        return find_model(runs[0])
    if runs:
        raise DsskError(f"{folder} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no model at {folder}: want a checkpoint, a fused model, or the folder of a run")


def load_model(path: str | Path, **kwargs):
    """Load (model in eval mode, tokenizer) from anything `find_model` finds; `kwargs` go to `from_pretrained`."""
    folder = find_model(path)
    try:
        model = CrossAttnGPTBigCodeForCausalLM.from_pretrained(folder, **kwargs)
    except (ValueError, KeyError) as error:
        raise DsskError(f"{folder}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise DamagedData(f"{folder}: the weights are damaged ({error})") from error
        raise
    return model.eval(), load_tokenizer(folder)
