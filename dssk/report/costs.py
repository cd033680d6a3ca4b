"""Bytes of a cached context by the published formulas: values stored for each of its tokens.

A KV cache holds a key and a value for each layer and KV head: `2 x layers x KV heads x head size`. This method holds
the state of one layer: `hidden size` (or of two). StarCoder has one KV head (multi-query attention), so its KV cache is
small already, and the saving in bytes is small; with a KV head for each attention head it would be `2 x layers`.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from dssk.models.shapes import kv_cache_values
from dssk.training.published import published_config

BYTES_PER_VALUE = 2  # bfloat16


@dataclass(frozen=True)
class CacheCost:
    """Cached bytes for each token of a context, for one model."""

    model: str
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    kv_cache_values: int
    stored_values: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.kv_cache_values * BYTES_PER_VALUE

    @property
    def stored_bytes(self) -> int:
        return self.stored_values * BYTES_PER_VALUE

    @property
    def ratio(self) -> float:
        """How many times less is stored than the KV cache would take."""
        return self.kv_cache_bytes / self.stored_bytes

    @property
    def multi_head_ratio(self) -> int:
        """`ratio` if the model had a KV head for each attention head."""
        return 2 * self.num_layers * self.hidden_size // self.stored_values


def of_model(name: str, config: PreTrainedConfig) -> CacheCost:
    """The bytes for a model of any family."""
    values = kv_cache_values(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = values // (2 * config.num_hidden_layers * head_size)
    stored = getattr(config, "states_width", config.hidden_size)  # a plain base keeps its last layer's states
    return CacheCost(name, config.num_hidden_layers, config.hidden_size, heads, values, stored)


STARCODERS = (
    "bigcode/starcoderbase-1b",
    "TabbyML/SantaCoder-1B",
    "bigcode/starcoderbase-3b",
    "bigcode/starcoderbase-7b",
    "bigcode/starcoder",
)
PUBLISHED = tuple(of_model(name, published_config(name)) for name in STARCODERS)
