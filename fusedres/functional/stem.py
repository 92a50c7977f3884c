"""stem: the 7x7 convolution of an image, its batch norm, ReLU and the max pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import autotune, ops
from fusedres.functional.autograd import differentiable_once, differentiated, transformed
from fusedres.functional.batch_norm import BatchNorm, check_activation, check_batch_norm
from fusedres.functional.bn_relu_maxpool import bn_relu_maxpool_of
from fusedres.functional.chain import ConvNorm

_OPS = torch.ops.fusedres
_SIDE, _PADDING = 7, 3


class StemConv(torch.autograd.Function):
    """The convolution and the statistics of its output; saves the image as it was packed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, norm: BatchNorm, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, stats, pixels = _OPS.stem_conv(x, weight, *norm.vectors(x), norm.eps, norm.training, dtype)
        ctx.mark_non_differentiable(stats)
        ctx.size, ctx.backend = x.shape[2:], ops.forced_backend()
        ctx.save_for_backward(pixels, weight)
        return y, stats

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, _OPS.stem_wgrad(grad, *saved, *ctx.size), None, None


def stem(x: Tensor, conv: ConvNorm) -> Tensor:
    """The stem: ``max_pool(relu(norm(conv(x))))``, 7x7 of stride 2, then 3x3 of stride 2.

    He et al. 2015, table 1. The convolution kernels read images of three channels that need no gradient;
    for others, and where no kernel serves, PyTorch's convolution runs.

    Args:
        x: [N, 3, H, W], bf16 | fp16 | fp32 | fp64; under autocast it and the weight are cast.
        conv: 7x7 filters of stride 2 with their batch norm; its running statistics are updated when training.

    Returns:
        [N, K, ceil(ceil(H / 2) / 2), ceil(ceil(W / 2) / 2)], dtype of x (autocast's, if that is on).

    Raises:
        TypeError, ValueError: a dtype, shape or device that doesn't fit.
        RuntimeError: a forced backend (:func:`fusedres.backend`) can't serve the call.
    """
    check_activation(x)
    weight, norm = conv.weight, conv.norm
    window = (x.shape[1], _SIDE, _SIDE)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != window or conv.geometry != (2, 1, 1):
        raise ValueError(
            f"conv must be [K, {', '.join(map(str, window))}] of stride 2, without dilation and groups, "
            f"got {list(weight.shape)}, {conv.geometry}"
        )
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    check_batch_norm(x, norm, "conv.norm.", shape)
    dtype = _dtype(x)
    if not _served(x, weight, norm, dtype):
        return bn_relu_maxpool_of(F.conv2d(x, weight, None, 2, _PADDING), norm)
    if differentiated(weight):
        y, stats = StemConv.apply(x, weight, norm, dtype)
    else:
        with torch.no_grad():
            y, stats, _ = _OPS.stem_conv(x, weight, *norm.vectors(x), norm.eps, norm.training, dtype)
    if not norm.training:
        return bn_relu_maxpool_of(y, norm)
    with torch.no_grad():
        stats = norm.update(stats, y.numel() // y.shape[1])
    return bn_relu_maxpool_of(y, norm, stats)


def _dtype(x: Tensor) -> torch.dtype:
    """Of the convolution."""
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast and x.dtype != torch.float64 else x.dtype


def _served(x: Tensor, weight: Tensor, norm: BatchNorm, dtype: torch.dtype) -> bool:
    if (
        x.requires_grad
        or x.numel() == 0
        or x.shape[1] != 3
        or weight.dtype not in (dtype, torch.float32)
        or transformed()
        or torch.compiler.is_compiling()
    ):
        return False
    like = x.new_empty(0, dtype=dtype)
    if not norm.kept_in(ops.stats_dtype(like)):
        return False

    def run(fused: bool) -> Any:
        vectors = norm.vectors(x)
        with torch.no_grad():
            if fused:
                return _OPS.stem_conv(x, weight, *vectors, norm.eps, norm.training, dtype)
            y = F.conv2d(x.to(dtype), weight.to(dtype), None, 2, _PADDING)
            return y, _OPS.bn_stats(y, *vectors, norm.eps) if norm.training else None

    return autotune.fused("stem_conv", like, ops.stem_shape(x, weight, dtype), run)
