"""The one way to load a model: a base, a checkpoint, a fused model, the folder of a run, or a name on the Hub.

What was saved with checksums is verified, the base below a checkpoint is recognised, no weight may be missing or
left over, and no code comes with a model. Whatever a damaged folder makes transformers raise is one line.
"""

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import GENERATION_CONFIG_NAME

from dssk.checkpoint import FINAL, MANIFEST, checkpoint_step, latest_checkpoint, verify_checkpoint
from dssk.errors import DamagedData, DsskError
from dssk.inference.auto import checked_model_type, family, register
from dssk.inference.faults import loading
from dssk.inference.fingerprint import is_model
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.configuration import CrossAttnConfig
from dssk.models.layers import LAST, layers_name
from dssk.models.weights import quiet_load_report
from dssk.utils.hub_names import is_on_hub

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"  # of peft
# Implementations that come with transformers or a package; any other name is fetched from the Hub as code.
_ATTENTION = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
FusedModel = Any  # a `CrossAttnForCausalLM` of whatever family: the classes are made at run time
_WANT = "want a checkpoint, a fused model, or the folder of a run"

register()


# --- finding -----------------------------------------------------------------------------------------------------


def find_model(path: str | Path) -> Path:
    """The folder to load for a checkpoint, a fused model, or a run's folder (its final model, else its newest)."""
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / FINAL / CONFIG).is_file():
        return folder / FINAL
    if newest := latest_checkpoint(folder):
        return newest
    runs = [run for run in sorted(folder.glob("*")) if latest_checkpoint(run)] if folder.is_dir() else []
    if len(runs) == 1:
        return find_model(runs[0])
    if runs:
        raise DsskError(f"{folder} holds {len(runs)} runs, want one of them, such as {runs[0]}")
    raise DsskError(f"no model at {folder}: {_WANT}")


def find_encoder(path: str | Path) -> tuple[str, str | None]:
    """The model that encodes contexts for `path`, and its revision: the base of a checkpoint, else itself.

    `path` is what `load` takes. A fused model has its base in it.
    """
    if is_on_hub(str(path)):
        return str(path), None
    folder = find_model(path)
    config: Any = load_config(folder)
    if isinstance(config, CrossAttnConfig) and config.cross_attn_only:
        return str(config.base_model_name_or_path), config.base_model_revision
    return str(folder.resolve()), None


def find_encode_layer(path: str | Path) -> str:
    """The layer whose states `path` reads, as a store writes it down: the last one's for a base."""
    source: str | Path = str(path) if is_on_hub(str(path)) else find_model(path)
    config: Any = load_config(source)
    if not isinstance(config, CrossAttnConfig):
        return LAST
    return layers_name(config.encode_layers, config.num_hidden_layers)


# --- configurations ----------------------------------------------------------------------------------------------


def load_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a base or a fused model. One that would fetch code, or cannot read a context, is refused."""
    if is_on_hub(str(path)):
        _say_hub(str(path), revision)
    with loading(path):
        values, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        _check_implementations(path, values)
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        # transformers itself goes on without a generation configuration that it cannot read.
        if (Path(path) / GENERATION_CONFIG_NAME).is_file():
            GenerationConfig.from_pretrained(path)
    if not isinstance(config, CrossAttnConfig):
        try:
            family(checked_model_type(config, path))
        except ValueError as error:
            raise DsskError(str(error)) from None
    return config


def load_base_config(path: str | Path, revision: str | None = None, fused: bool = False) -> PreTrainedConfig:
    """The configuration of a base model. With `fused` a fused model will do, too: its base is in it."""
    config = load_config(path, revision)
    if isinstance(config, CrossAttnConfig) and (not fused or config.cross_attn_only):
        raise DsskError(f"{path} is a fused model, want a base model")
    return config


def _check_implementations(path: str | Path, values: Any) -> None:
    """Refuse a configuration that names an implementation of its own, at any depth."""
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if isinstance(value, dict):
            _check_implementations(path, value)
        elif str(key).strip("_").removesuffix("_internal") in _IMPLEMENTATIONS and value is not None:
            known = value in _ATTENTION if "attn" in key else "/" not in str(value)
            if not known:
                raise DsskError(
                    f"{path}: its {CONFIG} names {key} {str(value)[:60]!r}, which is code from elsewhere: want one of "
                    f"{', '.join(sorted(_ATTENTION))}, or remove that line"
                )


# --- models ------------------------------------------------------------------------------------------------------


def load_model(
    path: str | Path, base_model: str | Path | None = None, **how: Any
) -> tuple[FusedModel, PreTrainedTokenizerBase]:
    """A fused model, frozen but for its blocks and in eval mode, and its tokenizer.

    `path` is what `find_model` takes, or a name on the Hub; `base_model` is where the base of a checkpoint is, if
    not where it was. `how` may have `dtype` (that of the weights), `device` (CPU) and `revision`.
    """
    on_hub = is_on_hub(str(path), "fused model")
    source: str | Path = str(path) if on_hub else find_model(path)
    config = load_config(source, how.get("revision"))
    if not isinstance(config, CrossAttnConfig):
        raise DsskError(f"{source} is a base model without cross-attention blocks: {_WANT}")
    if isinstance(source, Path) and (checkpoint_step(source) >= 0 or (source / MANIFEST).exists()):
        manifest = verify_checkpoint(source)
    else:
        manifest = {}
    if config.cross_attn_only:
        _check_base(source, config, base_model, manifest.get("base_fingerprint"))
    model = _load(source, config, base_model=base_model, **how)
    return model, load_tokenizer(source, how.get("revision"))


def load_base(path: str | Path, revision: str | None = None, **how: Any) -> PreTrainedModel:
    """A base model, frozen and in eval mode. `how` may have `dtype` (that of the weights) and `device` (CPU)."""
    model = _load(path, load_base_config(path, revision), revision=revision, **how)
    return model.requires_grad_(False)


def load_tuned(folder: str | Path, base: str | Path, **how: Any) -> PreTrainedModel:
    """A base that was tuned: whole in a folder, or as LoRA adapters (peft) of the model at `base`.

    The adapters are merged, and then cost nothing when answering.
    """
    if not is_adapters(folder):
        return load_base(folder, **how)
    with loading(folder):
        tuned = peft().PeftModel.from_pretrained(load_base(base, **how), str(folder)).merge_and_unload()
    return tuned.eval().requires_grad_(False)


def is_adapters(folder: str | Path) -> bool:
    """Whether a folder holds LoRA adapters of peft."""
    return (Path(folder) / ADAPTERS).is_file()


def peft() -> Any:
    """The package peft. Raises `DsskError` if it is not there."""
    try:
        import peft
    except ImportError as error:
        raise DsskError("LoRA adapters need peft: pip install 'dssk[compare]', or do without them") from error
    # peft asks for the old name of a property that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    return peft


def load(path: str | Path, revision: str | None = None, **how: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A base or a fused model, whichever `path` is, and its tokenizer."""
    is_fused = not is_on_hub(str(path)) and not (Path(path) / CONFIG).is_file()
    if is_fused or isinstance(load_config(path, revision), CrossAttnConfig):
        return load_model(path, revision=revision, **how)
    return load_base(path, revision, **how), load_tokenizer(path, revision)


def _check_base(source: str | Path, config: Any, base_model: str | Path | None, expected: str | None) -> None:
    """Refuse a base that is not there, or is not the one that the blocks were trained on."""
    base = base_model or config.base_model_name_or_path
    revision = None if base_model else config.base_model_revision
    try:
        base_config = load_base_config(base, revision)
    except DsskError as error:
        raise type(error)(f"the base of {source}: {error} (--base_model says where it is now)") from error
    if expected and not is_model(expected, base, base_config, revision):
        raise DsskError(
            f"{base} is not the base that {source} was trained on, its weights are others: bring that base back, or "
            "name a folder that holds it with --base_model"
        )


def _load(
    source: str | Path,
    config: PreTrainedConfig,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    **more: Any,
) -> Any:
    more = {key: value for key, value in more.items() if value is not None}
    with loading(source), quiet_load_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    if strange := (set(info["missing_keys"]) - tied) | set(info["unexpected_keys"]):
        raise DamagedData(
            f"the weights of {source} do not fit its {CONFIG}: {len(strange)} are missing or left over, such as "
            f"{sorted(strange)[0]}: fetch or convert the model again"
        )
    return model.to(device).eval()


def device(index: int = 0) -> torch.device:
    """GPU number `index` of this machine, or the CPU of one without any."""
    count = torch.cuda.device_count()
    if 0 < count <= index:
        raise DsskError(f"process {index} of this node has no GPU: start at most {count}")
    return torch.device("cuda", index) if count else torch.device("cpu")


@cache
def _say_hub(name: str, revision: str | None) -> None:
    """Say once that a model is fetched: nothing comes over the network in silence."""
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, CONFIG, revision=revision), str):
        return
    print(f"dssk: no folder {name} here: fetching it from the Hub", file=sys.stderr)
