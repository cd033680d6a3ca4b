"""Which decoder layers attend to the context, and how: the model's `config.json`."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTBigCodeConfig

INITS = ("zero", "normal", "copy")


@strict
class CrossAttnGPTBigCodeConfig(GPTBigCodeConfig):
    """A GPTBigCode configuration and where its cross-attention blocks sit.

    Args:
        num_cross_attn_layers: cross-attention blocks, counted back from the output.
        cross_attn_layers_stride: decoder layers from one block to the next below it.
        cross_attn_shared_weights: one set of weights serves all blocks (and is saved once).
        cross_attn_dropout_prob: in training, probability that a context token is hidden from attention.
        cross_attn_final_layer: a block follows its decoder layer instead of preceding it.
        cross_attn_shared_projections: queries and keys use one projection.
        cross_attn_hidden_size: width of queries, keys and values; `None` for the decoder's hidden size.
        cross_attn_num_attention_heads: `None` for as many as the decoder's.
        cross_attn_num_key_value_heads: fewer than the attention heads shrink the projected context;
            `None` for as many as there are attention heads.
        cross_attn_init: `"zero"` starts each block as the identity, so that the fused model equals its base
            until the first training step; `"normal"` draws its output projections like all others; `"copy"` is
            "zero" until `dssk.models.copy_init.copy_init_` has set the last block.
        cross_attn_only: the saved weights are the cross-attention blocks alone, to be placed into the base
            model named by `base_model_name_or_path` and `base_model_revision`.
    """

    model_type = "dssk_gpt_bigcode"
    attribute_map = {**GPTBigCodeConfig.attribute_map, "n_cross_attn_layers": "num_cross_attn_layers"}

    num_cross_attn_layers: int = 1
    cross_attn_layers_stride: int = 1
    cross_attn_shared_weights: bool = False
    cross_attn_dropout_prob: float | int = 0.0
    cross_attn_final_layer: bool = False
    cross_attn_shared_projections: bool = False
    cross_attn_hidden_size: int | None = None
    cross_attn_num_attention_heads: int | None = None
    cross_attn_num_key_value_heads: int | None = None
    cross_attn_init: str = "zero"
    cross_attn_only: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.cross_attn_hidden_size is None:
            self.cross_attn_hidden_size = self.n_embd
        if self.cross_attn_num_attention_heads is None:
            self.cross_attn_num_attention_heads = self.n_head
        if self.cross_attn_num_key_value_heads is None:
            self.cross_attn_num_key_value_heads = self.cross_attn_num_attention_heads
        self._check_layout()

    def _check_layout(self) -> None:
        layers, stride = self.num_cross_attn_layers, self.cross_attn_layers_stride
        if layers < 1 or stride < 1:
            raise ValueError(
                f"got {layers} cross-attention layers at stride {stride}, want at least 1 of each"
            )
        needed = stride * (layers - 1) + 1
        if needed > self.n_layer:
            raise ValueError(
                f"{layers} cross-attention layers at stride {stride} need {needed} decoder layers, the model has "
                f"{self.n_layer}: lower num_cross_attn_layers or cross_attn_layers_stride"
            )
        width, heads = self.cross_attn_hidden_size, self.cross_attn_num_attention_heads
        kv_heads = self.cross_attn_num_key_value_heads
        assert width is not None
        assert heads is not None
        assert kv_heads is not None
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
        if self.cross_attn_init not in INITS:
            raise ValueError(f"cross_attn_init is {self.cross_attn_init!r}, want one of {', '.join(INITS)}")

    @property
    def cross_attn_layers(self) -> list[int]:
        """Decoder layers that carry a block, last first: the stride counts back from the output."""
        last = self.n_layer - 1
        return [last - self.cross_attn_layers_stride * i for i in range(self.num_cross_attn_layers)]
