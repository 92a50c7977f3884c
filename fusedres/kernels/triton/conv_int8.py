"""conv_int8: a convolution of 8-bit activations and weights with what follows it in a trained net."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton import config
from fusedres.kernels.triton.common import saturated, tile
from fusedres.kernels.triton.conv_common import grouped
from fusedres.kernels.triton.conv_fwd import convolve, launch

VEC = tl.constexpr(config.INT8_VEC)


# z = max((conv(x) + offset) * scale + bias (+ residual * step), floor), rounded and saturated for 8 bits
# Reads x (a 3x3 its eight neighbours again, out of the caches), the weight (and residual), writes z. Sums are
# exact: int32.
@triton.jit(
    do_not_specialize=[
        *("residual_step", "floor", "rows", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups"),
    ]
)
def conv_int8_kernel(
    x,
    border,
    weight,
    offset,
    scale,
    bias,
    residual,
    residual_step,
    floor,
    z,
    rows,
    height,
    width,
    out_height,
    out_width,
    channel_groups,
    filter_groups,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    channels, filters = channel_groups * VEC, filter_groups * VEC
    tile_m, tile_n = grouped(tl.cdiv(rows, BLOCK_M), tl.cdiv(filters, BLOCK_N), GROUP_M)
    b_sum = convolve(
        *(x, None, None, None, None, border, weight, tile_m, tile_n),
        *(rows, height, width, out_height, out_width, channels, filters),
        *(TAPS, STRIDE, False, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    base, offsets, mask = tile(tile_m.to(tl.int64) * BLOCK_M, rows, b_n, filters, BLOCK_M)
    b_sum += tl.load(offset + b_n, mask=b_n < filters, other=0)[None, :]
    b_scale = tl.load(scale + b_n, mask=b_n < filters, other=0.0)
    b_bias = tl.load(bias + b_n, mask=b_n < filters, other=0.0)
    b_u = tl.fma(b_sum.to(tl.float32), b_scale[None, :], b_bias[None, :])
    if residual is not None:
        b_u += tl.load(residual + base + offsets, mask=mask, other=0).to(tl.float32) * residual_step
    b_u = tl.maximum(b_u, floor)
    b_z = saturated(b_u) if z.dtype.element_ty == tl.int8 else b_u.to(z.dtype.element_ty)
    tl.store(z + base + offsets, b_z, mask=mask)


def conv_int8(
    x: Tensor,
    border: Tensor,
    weight: Tensor,
    offset: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_step: float,
    floor: float,
    stride: int,
    z: Tensor,
) -> None:
    run = launch("conv_int8", x, weight, stride, z)
    with torch.cuda.device_of(x):
        conv_int8_kernel[run.grid](
            *(x, border if weight.shape[2] > 1 else None, weight, offset, scale, bias),
            *(residual, residual_step, floor, z, *run.sizes),
            **run.keywords,
        )
