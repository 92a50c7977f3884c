"""cast_weights: convolutions' weights in 16 bits, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres import ops
from fusedres.functional.autograd import differentiated

_OPS = torch.ops.fusedres


class CastWeight(torch.autograd.Function):
    """A weight's place in the graph for a cast of it that was made beforehand."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        return cast

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(torch.float32), None


def cast_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convolutions' float32 weights in 16 bits and channels_last, all in one launch on a GPU.

    Each result is differentiable with respect to its weight by itself.

    Args:
        weights: [K, C, R, S] each, fp32, on one device, of any layout.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        [K, C, R, S] each, ``dtype``, channels_last.

    Raises:
        ValueError: a weight of another dtype or number of dimensions, or on another device.
        TypeError: another ``dtype``.
    """
    if not weights:
        return []
    with torch.no_grad():
        casts = _OPS.cast_weights([w.detach() for w in weights], dtype)
    if not differentiated(*weights):
        return casts  # type: ignore[no-any-return]
    return [CastWeight.apply(w, cast) for w, cast in zip(weights, casts, strict=True)]


def casts_weights(device: torch.device) -> bool:
    """Whether :func:`cast_weights` saves anything on ``device``."""
    return ops.served("cast_weights", device, torch.float32, ops.forced_backend())
