"""What a cached context takes, by the published formulas: values stored for each token of it.

A KV cache holds a key and a value for each layer and KV head: `2 x layers x KV heads x head size`. This method holds
the output of the last layer: `hidden size`. StarCoder has one KV head (multi-query attention), so its KV cache is
small already, and the saving in bytes is small; with a KV head for each attention head it would be `2 x layers`.
"""

from dataclasses import dataclass

from transformers import GPTBigCodeConfig

BYTES_PER_VALUE = 2  # bfloat16


@dataclass(frozen=True)
class CacheCost:
    """Cached bytes for each token of a context, for one model."""

    model: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int

    @property
    def kv_cache_bytes(self) -> int:
        head_size = self.hidden_size // self.num_heads
        return 2 * self.num_layers * self.num_kv_heads * head_size * BYTES_PER_VALUE

    @property
    def stored_bytes(self) -> int:
        return self.hidden_size * BYTES_PER_VALUE

    @property
    def ratio(self) -> float:
        """How many times less is stored than the KV cache would take."""
        return self.kv_cache_bytes / self.stored_bytes

    @property
    def multi_head_ratio(self) -> int:
        """What `ratio` would be with a KV head for each attention head."""
        return 2 * self.num_layers


PUBLISHED = (
    CacheCost("bigcode/starcoderbase-1b", 24, 2048, 16, 1),
    CacheCost("TabbyML/SantaCoder-1B", 24, 2048, 16, 1),
    CacheCost("bigcode/starcoderbase-3b", 36, 2816, 22, 1),
    CacheCost("bigcode/starcoderbase-7b", 42, 4096, 32, 1),
    CacheCost("bigcode/starcoder", 40, 6144, 48, 1),
)


def of_model(name: str, config: GPTBigCodeConfig) -> CacheCost:
    """The same for a model at hand."""
    num_kv_heads = 1 if config.multi_query else config.n_head
    return CacheCost(name, config.n_layer, config.n_embd, config.n_head, num_kv_heads)
