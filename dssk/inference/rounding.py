"""Storage types of encoder states: quantizing and dequantizing."""

from typing import Literal

import torch

StorageDtype = Literal["fp32", "bf16", "fp16", "int8"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
SCALE_DTYPE = torch.bfloat16  # the range of float32 in two bytes; values are divided by the rounded scale
DEFAULT_STORAGE: StorageDtype = "bf16"


def encoding_bytes(storage_dtype: StorageDtype, hidden_size: int) -> int:
    """Bytes that one encoded token takes."""
    scale_bytes = SCALE_DTYPE.itemsize if storage_dtype == "int8" else 0
    return hidden_size * TORCH_DTYPES[storage_dtype].itemsize + scale_bytes


def quantize(states: torch.Tensor, storage_dtype: StorageDtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`states` (tokens, hidden_size) in the type they are stored in, and for int8 the scale of each token (tokens,)."""
    if storage_dtype != "int8":
        return states.to(TORCH_DTYPES[storage_dtype]), None
    scale = (states.float().abs().amax(dim=1) / 127).to(SCALE_DTYPE)
    divisor = scale.float().clamp(min=torch.finfo(SCALE_DTYPE).tiny)  # a token of zeros stays one
    return (states.float() / divisor[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The states (tokens, hidden_size) that `quantize` made; int8 becomes bfloat16."""
    return states if scale is None else states.to(SCALE_DTYPE) * scale[:, None]


def rounded(states: torch.Tensor, storage_dtype: StorageDtype) -> torch.Tensor:
    """States (tokens, hidden_size) as they come back from a store of this type."""
    return dequantize(*quantize(states, storage_dtype))
