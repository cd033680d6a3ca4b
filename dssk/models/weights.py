"""Loading and saving fused models: base weights under their own names, trained weights with them or alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from dssk.models.configuration import FIELDS, CrossAttnConfig, base_values

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

_Base: Any = PreTrainedModel if TYPE_CHECKING else object


def is_cross_attn(name: str) -> bool:
    """Whether a parameter belongs to the reader or its adapters: these are trained, saved apart and counted."""
    return "cross_attn." in name or "decoder_lora." in name


class FusedWeights(_Base):
    """Loading and saving; mixed in before a family's class."""

    config: Any

    @classmethod
    def from_base(cls, base: str | os.PathLike, revision: str | None = None, **kwargs: Any):
        """Place new cross-attention blocks into the model at `base`, a folder or a name on the Hub.

        `kwargs` are the fields of `CrossAttnConfig`; any other goes to `from_pretrained` (`dtype`, `device_map`,
        ...). Raises `ValueError` for an impossible layout or a base of another kind.
        """
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        config_class: Any = cls.config_class
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        values, _ = config_class.get_config_dict(base, revision=revision, **hub)
        if values.get("model_type") != config_class.model_type:
            raise ValueError(f"{base} is a {values.get('model_type')} model, want {config_class.model_type}")
        named = {
            "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else str(base),
            "base_model_revision": revision,
        }
        config = config_class(**{**base_values(values), **named, **ours})
        return cls._load_base(base, config, revision=revision, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any
    ):
        """Load a fused model, or cross-attention weights alone together with the base model they name.

        `base_model` (a folder or a Hub name) overrides where the base is looked for.
        """
        path, base = pretrained_model_name_or_path, kwargs.pop("base_model", None)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, CrossAttnConfig):
            # As transformers does: what is a field of the configuration changes it, the rest is for the model, and
            # so is the dtype, which may be "auto".
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                path if config is None else config, return_unused_kwargs=True, **{**hub, **kwargs}
            )
            kwargs |= hub | dtype
        load = super().from_pretrained
        if config.cross_attn_only:
            weights = _load_weights(path, kwargs.pop("variant", None), **hub)
            for name in hub:
                if name not in ("token", "cache_dir", "local_files_only"):
                    kwargs.pop(name)
            base = base or config.base_model_name_or_path
            with_info = kwargs.pop("output_loading_info", False)
            model = cls._load_base(base, config, revision=config.base_model_revision, **kwargs)
            model.load_cross_attention(weights)
            info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
            return (model, {**info, "error_msgs": []}) if with_info else model
        with_info = kwargs.pop("output_loading_info", False)
        model, info = load(path, *args, config=config, output_loading_info=True, **kwargs)
        if missing := sorted(name for name in info["missing_keys"] if is_cross_attn(name)):
            raise ValueError(f"{path} has no weights for {missing[0]} and {len(missing) - 1} more")
        model.freeze_base()
        return (model, info) if with_info else model

    @classmethod
    def _load_base(cls, base: str | os.PathLike, config: CrossAttnConfig, **kwargs: Any):
        """Base weights under their own names; exactly the cross-attention weights are new."""
        with quiet_load_report():  # checked below, more strictly
            model, info = super().from_pretrained(base, config=config, output_loading_info=True, **kwargs)
        expected = {name for name in model.state_dict() if is_cross_attn(name)}
        tied = set(model.all_tied_weights_keys)
        if strange := ((set(info["missing_keys"]) - tied) ^ expected) | set(info["unexpected_keys"]):
            raise ValueError(
                f"{base} is not a plain {config.model_type} checkpoint: "
                f"{len(strange)} keys, {sorted(strange)[0]}"
            )
        model.freeze_base()
        if config.reader == "merged":
            model.cross_attn_blocks[0].find_rows(model.base_model)
        return model

    def load_cross_attention(self, weights: dict[str, torch.Tensor]) -> None:
        """Load cross-attention weights, exactly those this model has; raises `ValueError` for any other set."""
        own = {name: tensor for name, tensor in self.state_dict().items() if is_cross_attn(name)}
        wrong = [n for n in own.keys() | weights.keys() if n not in own or n not in weights]
        wrong += [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
        if wrong:
            raise ValueError(
                f"cross-attention weights of another architecture: {len(wrong)} differ, {sorted(wrong)[0]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def save_pretrained(
        self, save_directory, *args: Any, cross_attn_only: bool = False, **kwargs: Any
    ) -> None:
        """Save the fused model, or with `cross_attn_only` the new weights and the name of their base: megabytes."""
        if cross_attn_only:
            if self.config.base_model_name_or_path is None:
                raise ValueError(
                    "this model names no base to place its blocks into, or its embeddings were resized: save it whole"
                )
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {name: t for name, t in state_dict.items() if is_cross_attn(name)}
            kwargs["save_original_format"] = False  # the names of a family's published weights are not ours
        was, self.config.cross_attn_only = self.config.cross_attn_only, cross_attn_only
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.cross_attn_only = was

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of the base alone, under its names."""
        return {name: tensor for name, tensor in self.state_dict().items() if not is_cross_attn(name)}

    def plain_base(self) -> PreTrainedModel:
        """A plain model of the base's family that shares its weights with this one."""
        plain_class: Any = next(
            c
            for c in type(self).__mro__
            if issubclass(c, PreTrainedModel) and not issubclass(c, FusedWeights)
        )
        with torch.device("meta"):
            plain = plain_class(plain_class.config_class(**self.config.base_dict()))
        plain.load_state_dict(self.base_state_dict(), assign=True)
        plain.tie_weights()
        for name, module in plain.named_modules():  # buffers that are not saved, such as rotary frequencies
            module._buffers.update(self.get_submodule(name)._buffers)
        plain.generation_config = self.generation_config
        return plain

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.base_model_name_or_path = None  # its embeddings are others now
        self.freeze_base()
        return embeddings


def _load_weights(path: str | os.PathLike, variant: str | None, **hub: Any) -> dict[str, torch.Tensor]:
    """All safetensors weights of a folder or a Hub repository, in one file or in shards."""
    import json

    from safetensors.torch import load_file

    stem = "model" if variant is None else f"model.{variant}"
    found = cached_file(path, f"{stem}.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if found is not None:
        return load_file(found)
    index = cached_file(
        path, f"model.safetensors.index{'' if variant is None else '.' + variant}.json", **hub
    )
    shards = sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values()))
    return {n: t for shard in shards for n, t in load_file(cached_file(path, shard, **hub)).items()}


@contextmanager
def quiet_load_report() -> Iterator[None]:
    """Silence transformers' report on missing weights; its level is left alone, other checks look at it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
