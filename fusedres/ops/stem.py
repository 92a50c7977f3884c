"""stem_conv and stem_wgrad: the 7x7 convolution of an image, stride 2, and its weight's gradient.

``pixels`` is the image as the kernels read it, packed once for both (``kernels/rows.py``). stem_bias_act is
the convolution with what surrounds it in a trained net: the image's normalisation, bias, ReLU, max pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres import plan
from fusedres.kernels.rows import STEM_CHANNELS, STEM_SIDE, pixels_shape
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out, new_stats, or_nothing


def shape_of(x: Tensor, weight: Tensor, dtype: torch.dtype) -> plan.Conv:
    """What the choice of the stem's implementation depends on."""
    n, c, h, w = x.shape
    ieee = dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return plan.Conv(n, c, h, w, weight.shape[0], weight.shape[2], 2, ieee=ieee)


def stem_conv(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    statistics: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight)
    y, y_stats, pixels = _outputs(x, weight, statistics, dtype)
    check_vectors(y, (weight.shape[0],), norm_weight=norm_weight, norm_bias=norm_bias)
    run = kernel("stem_conv", y, shape_of(x, weight, dtype))
    run(x, weight, norm_weight, norm_bias, eps, pixels, y, y_stats)
    return y, or_nothing(new_stats(y, 0), y_stats), pixels


def _outputs(
    x: Tensor, weight: Tensor, statistics: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    n, _, h, w = x.shape
    y = _convolved(x, weight, dtype)
    pixels = torch.empty(pixels_shape(n, h, w), dtype=dtype, device=x.device)
    return y, new_stats(y, y.shape[1]) if statistics else None, pixels


def _convolved(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout(x))


def stem_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pool: bool,
    dtype: torch.dtype,
) -> Tensor:
    _check(x, weight)
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != STEM_CHANNELS:
            raise ValueError(f"{name} must have {STEM_CHANNELS} values, got {len(values)}")
    z = _activated(x, weight, pool, dtype)
    check_vectors(z, (weight.shape[0],), bias=bias)
    if z.numel():
        run = kernel("stem_bias_act", z, shape_of(x, weight, dtype))
        run(x, weight, bias, mean, std, pool, z)
    return z


def _activated(x: Tensor, weight: Tensor, pool: bool, dtype: torch.dtype) -> Tensor:
    if not pool:
        return _convolved(x, weight, dtype)
    n, _, h, w = x.shape
    # of the convolution's output and of the pool's alike: half of it, rounded up
    shape = (n, weight.shape[0], (h + 3) // 4, (w + 3) // 4)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout(x))


def stem_wgrad(dy: Tensor, pixels: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    n = dy.shape[0]
    shape = (n, weight.shape[0], (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    if tuple(dy.shape) != shape or tuple(pixels.shape) != pixels_shape(n, height, width):
        raise ValueError(
            f"dy must be {list(shape)} and pixels {list(pixels_shape(n, height, width))}, "
            f"got {list(dy.shape)} and {list(pixels.shape)}"
        )
    if dy.dtype != pixels.dtype or weight.dtype not in (dy.dtype, torch.float32):
        raise TypeError(f"dy must be {pixels.dtype}, weight that or float32, got {dy.dtype}, {weight.dtype}")
    image = torch.Size((n, STEM_CHANNELS, height, width))
    run = kernel("stem_wgrad", dy, shape_of(dy.new_empty(image, device="meta"), weight, dy.dtype))
    (dy,) = laid_out(layout(dy), dy)
    dweight = torch.empty_like(weight)
    run(dy, pixels.contiguous(), dweight)
    return dweight


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != STEM_CHANNELS:
        raise ValueError(f"x must be [N, {STEM_CHANNELS}, H, W], got {list(x.shape)}")
    window = (STEM_CHANNELS, STEM_SIDE, STEM_SIDE)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != window:
        raise ValueError(f"weight must be [K, {', '.join(map(str, window))}], got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")


def _fake_conv(x, weight, norm_weight, norm_bias, eps, statistics, dtype):  # type: ignore[no-untyped-def]
    y, y_stats, pixels = _outputs(x, weight, statistics, dtype)
    return y, or_nothing(new_stats(y, 0), y_stats), pixels


OPS = {
    # dtype: of the output; x and the weight are rounded to it on the way
    "stem_conv": Op(
        "(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, float eps, bool statistics,"
        " ScalarType dtype) -> (Tensor y, Tensor y_stats, Tensor pixels)",
        stem_conv,
        _fake_conv,
    ),
    # mean, std: x stands for (x - mean) / std, channel by channel, which is what is rounded to dtype
    "stem_bias_act": Op(
        "(Tensor x, Tensor weight, Tensor? bias, float[]? mean, float[]? std, bool pool, ScalarType dtype)"
        " -> Tensor",
        stem_bias_act,
        lambda x, weight, bias, mean, std, pool, dtype: _activated(x, weight, pool, dtype),
    ),
    # weight: for the shape, the dtype and the layout of its gradient; height and width: the image's
    "stem_wgrad": Op(
        "(Tensor dy, Tensor pixels, Tensor weight, int height, int width) -> Tensor",
        stem_wgrad,
        lambda dy, pixels, weight, height, width: torch.empty_like(weight),
    ),
}
