"""conv_bias_act: a convolution with what follows it in a trained net: bias, residual, ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import tile
from fusedres.kernels.triton.conv_common import VEC, grouped
from fusedres.kernels.triton.conv_fwd import convolve, launch


# z = relu(conv(x) + bias (+ residual)), rounded once
# Reads x (a 3x3 its eight neighbours again, out of the caches), the weight (and residual), writes z.
@triton.jit(
    do_not_specialize=[
        *("rows", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups"),
    ]
)
def conv_bias_act_kernel(
    x,
    weight,
    bias,
    residual,
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
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    channels, filters = channel_groups * VEC, filter_groups * VEC
    tile_m, tile_n = grouped(tl.cdiv(rows, BLOCK_M), tl.cdiv(filters, BLOCK_N), GROUP_M)
    b_u = convolve(
        *(x, None, None, None, None, None, weight, tile_m, tile_n),
        *(rows, height, width, out_height, out_width, channels, filters),
        *(TAPS, STRIDE, RELU, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    base, offsets, mask = tile(tile_m.to(tl.int64) * BLOCK_M, rows, b_n, filters, BLOCK_M)
    if bias is not None:
        b_u += tl.load(bias + b_n, mask=b_n < filters, other=0.0)[None, :]
    if residual is not None:
        b_u += tl.load(residual + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        b_u = tl.where(b_u <= 0, 0.0, b_u)  # relu(NaN) is NaN
    tl.store(z + base + offsets, b_u.to(z.dtype.element_ty), mask=mask)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    z: Tensor,
) -> None:
    run = launch("conv_bias_act", x, weight, stride, z)
    with torch.cuda.device_of(x):
        conv_bias_act_kernel[run.grid](
            *(x, weight, bias, residual, z, *run.sizes),
            RELU=relu,
            **run.keywords,
        )
