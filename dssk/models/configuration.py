"""The configuration of a fused model: which decoder layers attend to the context, and how."""

import json
import os
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from dssk.models.layers import LAST, layer_index, named_layers

MODEL_TYPE = "dssk"  # in the config.json of every fused model; `base_model_type` names the family
BASE = "base"  # value of a field: the same as in the base model
OVERLAP = "overlap"
COPYING = ("copy", OVERLAP)  # values of `cross_attn_init` that `dssk.models.copy_init` is for
CHOICES = {
    "cross_attn_init": ("zero", "normal", *COPYING, BASE),
    "reader": ("cross_attention", "merged"),
    "cross_attn_norm": ("layer_norm", "rms_norm"),
    "cross_attn_mlp": ("plain", "gated"),
}

# What `BASE` needs to know of a family and its configuration does not say; a test compares it with the models.
_RMS_NORM_ANYWAY = {"lfm2", "mamba"}  # their epsilon has another name than `rms_norm_eps`
_PLAIN_MLP = (
    "bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mamba mpt nemotron opt persimmon phi "
    "starcoder2"
)
_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ACTIVATION = ("hidden_activation", "hidden_act", "activation_function", "activation")


# For type checkers, a mixin derives from the class that it is mixed into.
_Base: Any = PreTrainedConfig if TYPE_CHECKING else object


class CrossAttnConfig(_Base):
    """Mixed into the configuration of a base model: where its cross-attention blocks sit, and how they are built.

    Args:
        num_cross_attn_layers: cross-attention blocks, counted back from the output.
        cross_attn_layers_stride: decoder layers from one block to the next below it.
        cross_attn_shared_weights: one set of weights serves all blocks (and is saved once).
        cross_attn_dropout_prob: in training, probability that a context token is hidden from attention.
        cross_attn_final_layer: a block follows its decoder layer instead of preceding it.
        cross_attn_shared_projections: queries and keys use one projection.
        cross_attn_hidden_size: width of queries, keys and values; `None` for the decoder's hidden size.
        cross_attn_num_attention_heads: `None` for as many as the decoder's.
        cross_attn_num_key_value_heads: fewer than the attention heads shrink the projected context; `None` for all
            heads, `"base"` for the share of heads that the base's own attention has.
        cross_attn_norm: `"layer_norm"`, `"rms_norm"`, or `"base"` for the kind the base has.
        cross_attn_mlp: `"plain"` (d -> 4E -> d), `"gated"` (two matrices in, 8/3 E wide), or `"base"`.
        cross_attn_init: `"zero"` starts each block as the identity, so that the fused model equals its base
            until the first training step; `"normal"` draws its output projections like all others; `"copy"` and
            `"overlap"` are "zero" until `dssk.models.copy_init.copy_init_` has set the last block, and so is `"base"`
            until `dssk.inference.base_init.base_init_` has set all of them as their layers' self-attention.
        reader: what reads a context: `"cross_attention"`, the blocks, or `"merged"`, the base's own attention, to which
            maps make keys and values of every layer from stored states (`dssk.models.merged`; no block is placed then).
        encode_layer: whose states are stored and read: `"last"`, after the final norm; a layer, whose input it is; a
            share of the depth; or two of these, one state behind the other: `"9+18"`, or a list.
        reader_rank: width of a bottleneck that the maps of a merged reader share; `None` for full maps.
        reader_replay: layers, from `encode_layer` on, that a merged reader runs again on stored states: their
            keys and values are exact, at the cost of so many layers of a prompt; maps serve the other layers.
        decoder_lora: low-rank adapters of the decoder's linear layers, which act only while a context is read:
            `{"rank": 16}`, optionally with `"alpha"` (default: twice the rank); their output is scaled by alpha / rank.
        cross_attn_only: the saved weights are the cross-attention blocks alone, to be placed into the base
            model named by `base_model_name_or_path` and `base_model_revision`.
    """

    num_cross_attn_layers: int = 1
    cross_attn_layers_stride: int = 1
    cross_attn_shared_weights: bool = False
    cross_attn_dropout_prob: float | int = 0.0
    cross_attn_final_layer: bool = False
    cross_attn_shared_projections: bool = False
    cross_attn_hidden_size: int | None = None
    cross_attn_num_attention_heads: int | None = None
    cross_attn_num_key_value_heads: int | str | None = None
    cross_attn_norm: str = BASE
    cross_attn_mlp: str = BASE
    cross_attn_init: str = "zero"
    reader: str = "cross_attention"
    encode_layer: str | int | float | list = LAST
    reader_rank: int | None = None
    reader_replay: int = 0
    decoder_lora: dict | None = None
    cross_attn_only: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("base_model_type", None)
        super().__post_init__(**kwargs)
        config: Any = self
        if self.cross_attn_hidden_size is None:
            self.cross_attn_hidden_size = config.hidden_size
        heads = self.cross_attn_num_attention_heads
        if heads is None:
            heads = self.cross_attn_num_attention_heads = num_attention_heads(config)
        if self.cross_attn_num_key_value_heads is None:
            self.cross_attn_num_key_value_heads = heads
        elif self.cross_attn_num_key_value_heads == BASE:
            self.cross_attn_num_key_value_heads = max(
                1, heads * _kv_heads(config) // num_attention_heads(config)
            )
        if self.cross_attn_norm == BASE:
            self.cross_attn_norm = base_norm(config)
        if self.cross_attn_mlp == BASE:
            self.cross_attn_mlp = "plain" if config.model_type in _PLAIN_MLP.split() else "gated"
        if self.decoder_lora is not None:
            self.decoder_lora = _checked_lora(**self.decoder_lora)
        self._check_layout()

    def _check_layout(self) -> None:
        layers, stride = self.num_cross_attn_layers, self.cross_attn_layers_stride
        if layers < 1 or stride < 1:
            raise ValueError(
                f"got {layers} cross-attention layers at stride {stride}, want at least 1 of each"
            )
        needed, available = stride * (layers - 1) + 1, self.num_hidden_layers
        if needed > available:
            raise ValueError(
                f"{layers} cross-attention layers at stride {stride} need {needed} decoder layers, the model has "
                f"{available}: lower num_cross_attn_layers or cross_attn_layers_stride"
            )
        width, heads = self.cross_attn_hidden_size, self.cross_attn_num_attention_heads
        kv_heads = self.cross_attn_num_key_value_heads
        assert width is not None
        assert heads is not None
        if not isinstance(kv_heads, int):
            raise ValueError(
                f"cross_attn_num_key_value_heads is {kv_heads!r}, want a number, {BASE!r} or null"
            )
        if width % heads:
            raise ValueError(
                f"cross_attn_hidden_size {width} is not a multiple of cross_attn_num_attention_heads {heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"cross_attn_num_attention_heads {heads} is not a multiple of "
                f"cross_attn_num_key_value_heads {kv_heads}"
            )
        if self.cross_attn_shared_projections and kv_heads != heads:
            raise ValueError(
                "cross_attn_shared_projections gives keys as many heads as queries: got "
                f"cross_attn_num_key_value_heads {kv_heads}, want {heads} or null"
            )
        if not 0 <= self.cross_attn_dropout_prob < 1:
            raise ValueError(f"cross_attn_dropout_prob is {self.cross_attn_dropout_prob}, want 0 <= p < 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, want one of {', '.join(choices)}")

        if not self.encode_layers:
            raise ValueError(f"encode_layer is {self.encode_layer}, want at least one layer")
        if self.reader_rank is not None and self.reader_rank > self.states_width:
            raise ValueError(
                f"reader_rank is {self.reader_rank}, more than the {self.states_width} values of a state"
            )
        if len(self.encode_layers) > 1 and self.reader == "cross_attention":
            raise ValueError(f"encode_layer is {self.encode_layer}, blocks read one layer's states: want one")
        most = self.num_hidden_layers - self.encode_layers[-1] if self.reader == "merged" else 0
        if not 0 <= self.reader_replay <= most:
            raise ValueError(
                f"reader_replay is {self.reader_replay}, from encode_layer {self.encode_layer} on the "
                f"{self.reader} reader has {most} layers to run again: want 0 to {most}"
            )

    @property
    def encode_layers(self) -> tuple[int, ...]:
        """The layers whose inputs are stored, `num_hidden_layers` for the state after the final norm."""
        if isinstance(self.encode_layer, str):
            return named_layers(self.encode_layer, self.num_hidden_layers)
        several = self.encode_layer if isinstance(self.encode_layer, list) else [self.encode_layer]
        return tuple(layer_index(layer, self.num_hidden_layers) for layer in several)

    @property
    def states_width(self) -> int:
        """Values that are stored for each token of a context: the states of all layers, behind one another."""
        return self.hidden_size * len(self.encode_layers)

    @property
    def replayed_layers(self) -> range:
        """The layers that are run again on a context's stored states."""
        first = self.encode_layers[-1]
        return range(first, first + self.reader_replay)

    @property
    def cross_attn_layers(self) -> list[int]:
        """Decoder layers that carry a block, last first: the stride counts back from the output."""
        last = self.num_hidden_layers - 1
        return [last - self.cross_attn_layers_stride * i for i in range(self.num_cross_attn_layers)]

    @property
    def reading_layers(self) -> list[int]:
        """Decoder layers that attend to a context, lowest first: those with a block, or all for a merged reader."""
        return (
            list(range(self.num_hidden_layers)) if self.reader == "merged" else sorted(self.cross_attn_layers)
        )

    def base_dict(self) -> dict[str, Any]:
        """The configuration of the base alone, as a plain model of its family would be given it."""
        values = self.to_dict()
        ours = {*FIELDS, "architectures", "auto_map", "base_model_type"}
        return {key: value for key, value in values.items() if key not in ours}

    # A fused model's file has a model type of its own, so that a plain model is never loaded from it by mistake. In
    # memory the type stays the base's: transformers and other libraries look up what the family needs by it.

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type", "").startswith(MODEL_TYPE):
            values["model_type"] = cls.model_type
        return values, unused

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        values = self.to_diff_dict() if use_diff else self.to_dict()
        values |= {"model_type": MODEL_TYPE, "base_model_type": self.model_type, "auto_map": AUTO_MAP}
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        with open(os.path.join(save_directory, f"{REMOTE_MODULE}.py"), "w", encoding="utf-8") as file:
            file.write(REMOTE_CODE)


def _checked_lora(rank: int = 0, alpha: float | None = None, **unknown: Any) -> dict[str, Any]:
    """The settings of adapters, complete. Raises `ValueError` for others."""
    alpha = 2 * rank if alpha is None else alpha
    if unknown or not isinstance(rank, int) or rank < 1 or not alpha > 0:
        given = {"rank": rank, "alpha": alpha, **unknown}
        raise ValueError(f"decoder_lora is {given}, want a rank of at least 1, and at will an alpha above 0")
    return {"rank": rank, "alpha": alpha}


FIELDS = tuple(CrossAttnConfig.__annotations__)

# Saved beside the weights: where dssk is missing, transformers reports from it what to install.
REMOTE_MODULE = "modeling_dssk"
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_MODULE}.DsskConfig",
    "AutoModel": f"{REMOTE_MODULE}.DsskModel",
    "AutoModelForCausalLM": f"{REMOTE_MODULE}.DsskForCausalLM",
}
REMOTE_CODE = '''"""This model needs the package dssk: `pip install dssk`, and `import dssk` before it is loaded."""

from dssk.inference.auto import DsskConfig, DsskForCausalLM, DsskModel

__all__ = ["DsskConfig", "DsskForCausalLM", "DsskModel"]
'''


def base_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a base's configuration that a fused one inherits."""
    ignored = ("model_type", "architectures", "transformers_version", "auto_map")
    return {key: value for key, value in values.items() if key not in ignored}


def first_of(config: PreTrainedConfig, names: tuple[str, ...], default: Any = None) -> Any:
    """The first of several attributes that a configuration has: families name the same thing differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def num_attention_heads(config: PreTrainedConfig) -> int:
    """Heads of the base; 1 for a family without attention, whose blocks then have one."""
    return first_of(config, ("num_attention_heads", "num_heads"), 1)


def _kv_heads(config: PreTrainedConfig) -> int:
    if getattr(config, "multi_query", False):
        return 1
    return first_of(config, ("num_key_value_heads", "num_kv_heads"), num_attention_heads(config))


def base_norm(config: PreTrainedConfig) -> str:
    """`"rms_norm"` or `"layer_norm"`, whichever the base has."""
    is_rms = hasattr(config, "rms_norm_eps") or config.model_type in _RMS_NORM_ANYWAY
    return "rms_norm" if is_rms else "layer_norm"


def norm_eps(config: PreTrainedConfig) -> float:
    """The epsilon of the base's norms."""
    return first_of(config, _NORM_EPS, 1e-5)


def activation(config: PreTrainedConfig) -> str:
    """The name of the base's activation function."""
    return first_of(config, _ACTIVATION, "gelu")
