"""cast_weights: all weights of a model in 16 bits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.dispatch import kernel
from fusedres.ops.tensors import Op


def cast_weights(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    for weight in weights:
        if weight.dtype != torch.float32 or weight.dim() != 4:
            raise ValueError(
                f"weights must be 4D torch.float32, got {weight.dim()}D {list(weight.shape)} {weight.dtype}"
            )
        if weight.device != weights[0].device:
            raise ValueError(f"weights must be on one device, got {weights[0].device} and {weight.device}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    given = [w if _is_dense(w) else w.contiguous() for w in weights]
    out = [_new_cast(w, dtype) for w in given]
    kernel("cast_weights", given[0])(given, out)
    return out


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _new_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)


OPS = {
    "cast_weights": Op(
        "(Tensor[] weights, ScalarType dtype) -> Tensor[]",
        cast_weights,
        lambda weights, dtype: [_new_cast(w, dtype) for w in weights],
    ),
}
