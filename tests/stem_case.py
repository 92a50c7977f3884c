"""The stem's kernels, of any implementation, against float64."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from torch import Tensor

from fusedres.kernels.rows import pixels_shape

EPS = 1e-5
LAST = torch.channels_last
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (1, 6), (2, 3), (7, 1), (8, 17)]


def convolve(x, weight):
    return F.conv2d(x, weight, stride=2, padding=3)


def weight_gradient(x, shape, dy):
    return torch.nn.grad.conv2d_weight(x, shape, dy, stride=2, padding=3)


def statistics(y, weight, bias):
    """mean, var, rstd, scale and shift of y's channels."""
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    rstd = (var + EPS).rsqrt()
    scale = weight * rstd
    return mean, var, rstd, scale, bias - mean * scale


def outputs(x, filters, dtype):
    """pixels, y and its statistics, to be written."""
    n, _, h, w = x.shape
    pixels = torch.empty(pixels_shape(n, h, w), dtype=dtype)
    y = torch.empty((n, filters, (h + 1) // 2, (w + 1) // 2), dtype=dtype, memory_format=LAST)
    return pixels, y, torch.empty(5, filters)


def packed(x):
    """What ``pixels`` has to hold, in the dtype of ``x``."""
    n, _, h, w = x.shape
    _, rows, columns, _ = pixels_shape(n, h, w)
    return F.pad(x, (4, columns - w - 4, 3, rows - h - 3, 0, 1)).permute(0, 2, 3, 1)


def as_multiplied(x: Tensor) -> Tensor:
    """As tensor cores see it: float32 with 10 bits behind the point, ties away from zero."""
    if x.dtype != torch.float32:
        return x
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent)


def check(
    kernels: ModuleType,
    x: Tensor,
    filters: int,
    dtype: torch.dtype,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    weight_dtype: torch.dtype | None = None,
    twice: bool = False,
) -> None:
    """``kernels``' stem_conv and stem_wgrad on ``x``: every output, and the same bits again."""
    given = as_multiplied(x.to(dtype))
    if x.dtype == dtype == torch.float32:
        x = x.copy_(given)
    weight = as_multiplied((torch.randn(filters, 3, 7, 7) / 147**0.5).to(dtype)).to(memory_format=layout)
    norm_weight, norm_bias = torch.randn(2, filters)
    pixels, y, y_stats = outputs(x, filters, dtype)
    kernels.stem_conv(x, weight, norm_weight, norm_bias, EPS, pixels, y, y_stats)
    assert_close_to_reference(y, convolve(given, weight), convolve(given.double(), weight.double()), name="y")
    # the statistics are those of the values that were stored
    for row, value in enumerate(statistics(y.double(), norm_weight, norm_bias)):
        torch.testing.assert_close(y_stats[row].double(), value, rtol=2e-5, atol=2e-5)

    dy = as_multiplied(torch.randn(y.shape).to(dtype)).to(memory_format=LAST)
    dweight = torch.empty_like(weight, dtype=weight_dtype)
    kernels.stem_wgrad(dy, pixels, dweight)
    reference = weight_gradient(given.double(), weight.shape, dy.double())
    wide = dweight.dtype if dtype == torch.bfloat16 or weight_dtype else torch.float32
    theirs = weight_gradient(given.to(wide), weight.shape, dy.to(wide)).to(dweight.dtype)
    assert_close_to_reference(dweight, theirs, reference, name="dweight")

    if twice:
        again_pixels, again, again_stats = outputs(x, filters, dtype)
        again_dweight = torch.empty_like(dweight)
        kernels.stem_conv(x, weight, norm_weight, norm_bias, EPS, again_pixels, again, again_stats)
        kernels.stem_wgrad(dy, again_pixels, again_dweight)
        for one, other in ((again, y), (again_stats, y_stats), (again_dweight, dweight)):
            assert torch.equal(one, other)
