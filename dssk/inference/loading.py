"""The one way to load a model: from a base, a checkpoint, a fused folder, or the folder of a run."""

import json
from pathlib import Path

from dssk.checkpoint import FINAL, MANIFEST, checkpoint_step, latest_checkpoint, verify_checkpoint
from dssk.errors import DamagedData, DsskError
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM


def find_model(path: str | Path) -> Path:
    """The folder to load for a checkpoint, a fused model, or a run's folder (its final model, else its newest)."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / FINAL / "config.json").is_file():
        return folder / FINAL
    if newest := latest_checkpoint(folder):
        return newest
    runs = [run for run in sorted(folder.glob("*")) if latest_checkpoint(run)] if folder.is_dir() else []
    if len(runs) == 1:
        return find_model(runs[0])
    if runs:
        raise DsskError(f"{folder} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no model at {folder}: want a checkpoint, a fused model, or the folder of a run")


def find_encoder(path: str | Path) -> tuple[str, str | None]:
    """The model that encodes contexts for `path`, and its revision: the base of a checkpoint, else itself.

    `path` is what `find_model` takes, a base model, or a name on the Hub. A fused model has its base in it.
    """
    if not Path(path).exists():
        return str(path), None
    folder = find_model(path)
    config = json.loads((folder / "config.json").read_bytes())
    if config.get("cross_attn_only"):
        return config["base_model_name_or_path"], config["base_model_revision"]
    return str(folder.resolve()), None


def load_model(path: str | Path, **kwargs):
    """Load (model in eval mode, tokenizer) from anything `find_model` finds; `kwargs` go to `from_pretrained`."""
    folder = find_model(path)
    if checkpoint_step(folder) >= 0 or (folder / MANIFEST).exists():
        verify_checkpoint(folder)
    try:
        model = CrossAttnGPTBigCodeForCausalLM.from_pretrained(folder, **kwargs)
    except (ValueError, KeyError) as error:
        raise DsskError(f"{folder}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise DsskError(
            f"cannot load {folder} or the base it names: {str(error).splitlines()[0]} (python -m dssk.export fuses it "
            "with a base that has moved)"
        ) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise DamagedData(f"{folder}: the weights are damaged ({error})") from error
        raise
    return model.eval(), load_tokenizer(folder)
