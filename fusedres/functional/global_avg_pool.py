"""global_avg_pool: the mean over all pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.functional.autograd import differentiable_once, differentiated, serves
from fusedres.functional.batch_norm import check_activation

_OPS = torch.ops.fusedres


class GlobalAvgPool(torch.autograd.Function):
    """The mean over H and W; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[2:]
        ctx.backend = ops.forced_backend()
        return _OPS.global_avg_pool(x)  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> Tensor:
        return _OPS.global_avg_pool_backward(grad, *ctx.size)  # type: ignore[no-any-return]


def global_avg_pool(x: Tensor) -> Tensor:
    """The mean over H and W, summed in float32 (He et al. 2015, section 3.3).

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32 | fp64.

    Returns:
        [N, C, 1, 1], dtype of x.

    Raises:
        ValueError: x isn't 4D.
        TypeError: x isn't floating point.
    """
    check_activation(x)
    if not serves("global_avg_pool", x):
        return F.adaptive_avg_pool2d(x, 1)
    if not differentiated(x):
        return _OPS.global_avg_pool(x)  # type: ignore[no-any-return]
    return GlobalAvgPool.apply(x)  # type: ignore[no-any-return]
