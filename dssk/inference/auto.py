"""The fused classes of every family of decoders, and how transformers' Auto classes find them.

A family's classes are made when its first model is; none is written by hand. `model_type` of a saved configuration is
"dssk", and `base_model_type` names the family.
"""

import functools
import os
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from dssk.inference.answering import Answers
from dssk.models.configuration import MODEL_TYPE, base_values
from dssk.models.families import family_classes

V01_MODEL_TYPE = "dssk_gpt_bigcode"  # what version 0.1 wrote, for its one family

# Families whose layers could be given blocks, and that would not work all the same.
REFUSED = {
    "rwkv": "its recurrent state is not carried through beam search",
}


class Family(NamedTuple):
    """The classes of one family."""

    config: Any
    backbone: Any
    causal_lm: Any


@functools.cache
def family(model_type: str) -> Family:
    """The fused classes for bases of a model type, registered. Raises `ValueError` for one that cannot work."""
    if model_type in REFUSED:
        raise ValueError(f"{model_type} models cannot read a cached context: {REFUSED[model_type]}")
    known = model_type in CONFIG_MAPPING
    config_class: Any = CONFIG_MAPPING[model_type] if known else None
    # Some model types are second names for the same classes.
    if config_class is not None and config_class.model_type != model_type:
        return family(config_class.model_type)
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    backbone_class = MODEL_MAPPING.get(config_class, None)
    if causal_class is None or backbone_class is None:
        raise ValueError(
            f"{model_type} models cannot read a cached context: want a decoder-only language model of transformers"
        )
    classes = Family(*family_classes(config_class, backbone_class, causal_class, Answers))
    for made in classes:
        made.__module__ = __name__  # they are found here by name, see `__getattr__`
    for plain, fused in ((backbone_class, classes.backbone), (causal_class, classes.causal_lm)):
        # Some families rename weights by class.
        if conversion := get_checkpoint_conversion_mapping(plain.__name__):
            register_checkpoint_conversion_mapping(fused.__name__, conversion, overwrite=True)
    AutoModel.register(classes.config, classes.backbone, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
    return classes


def from_base(base: str | os.PathLike, revision: str | None = None, **kwargs: Any):
    """Place new cross-attention blocks into the model at `base`, a folder or a name on the Hub.

    >>> model = dssk.from_base("meta-llama/Llama-3.2-1B", num_cross_attn_layers=4, cross_attn_layers_stride=3)

    `kwargs` are the fields of `dssk.models.configuration.CrossAttnConfig`; any other goes to `from_pretrained`
    (`dtype`, `device_map`, ...). Raises `ValueError` for an impossible layout or a base that cannot read a context.
    """
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    return family(checked_model_type(config, base)).causal_lm.from_base(base, revision=revision, **kwargs)


def fused_config(base: PreTrainedConfig, **fields: Any) -> Any:
    """The configuration of a fused model on a base that `base` describes. Raises `ValueError` as `from_base` does."""
    return family(checked_model_type(base, base.name_or_path)).config(
        **{**base_values(base.to_dict()), **fields}
    )


def checked_model_type(config: PreTrainedConfig, name: str | os.PathLike) -> str:
    """The model type of a base. Raises `ValueError` for what is no decoder-only language model."""
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(f"{name} is a {config.model_type} model: want a decoder-only language model")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} has cross-attention of its own: want a decoder-only language model")
    return config.model_type


class DsskConfig(PreTrainedConfig):
    """Registered with `AutoConfig` for fused models; loading returns the configuration of the family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        named = config_dict.get("base_model_type") or V01_MODEL_TYPE.removeprefix(f"{MODEL_TYPE}_")
        classes = family(named)
        return classes.config.from_dict({**config_dict, "model_type": named}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        values, kwargs = cls.get_config_dict(*args, **kwargs)
        return cls.from_dict(values, **kwargs)


class V01Config(DsskConfig):
    """The same for what version 0.1 wrote."""

    model_type = V01_MODEL_TYPE


class DsskModel(AutoModel):
    """`AutoModel`, for folders that are loaded with `trust_remote_code` and without `import dssk`."""


class DsskForCausalLM(AutoModelForCausalLM):
    """`AutoModelForCausalLM`, for the same."""


def register() -> None:
    """Let `AutoConfig` know fused models; their model classes follow when a configuration is loaded."""
    for config in (DsskConfig, V01Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Fused classes by name, such as `CrossAttnLlamaForCausalLM`: for whoever unpickles or documents one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    plain = name.removeprefix("CrossAttn")
    for names in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        for model_type, class_name in names.items():
            if plain != name and class_name == plain and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                causal_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
                own_type = causal_class.config_class.model_type  # several types may share the class
                return next(made for made in family(own_type) if made.__name__ == name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
