"""conv_fwd: a convolution that consumes a batch norm and leaves the statistics of its output."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.bn_stats import bn_stats_finalize_kernel
from fusedres.kernels.triton.config import FINALIZE, arch_of
from fusedres.kernels.triton.conv_common import VEC, activation, dot, grouped, pixel
from fusedres.kernels.triton.conv_config import ConvProblem, select


# y = conv(relu(x * scale + shift)), partial = mean and sum of (y - mean)^2 over the positions of a tile
# Reads x (a 3x3 its eight neighbours again, out of the caches) and the weight, writes y and 2K floats a tile.
# The padding is behind the prologue: 0, not relu(shift). Taps and channels are one loop, so that loads of
# the next tap are under way before this one ends.
@triton.jit(
    do_not_specialize=[
        *("rows", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups"),
    ]
)
def conv_fwd_kernel(
    x,
    stats,
    weight,
    y,
    partial,
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
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = grouped(tiles_m, tl.cdiv(filters, BLOCK_N), GROUP_M)
    first = tile_m * BLOCK_M
    b_m = first + tl.arange(0, BLOCK_M)
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = tl.arange(0, BLOCK_K)
    b_row = b_m < rows

    if TAPS == 1 and STRIDE == 1:
        origin = first
        b_pixel = tl.arange(0, BLOCK_M)
    else:
        image, p, q = pixel(first, out_height, out_width)
        origin = (image * height + p * STRIDE) * width + q * STRIDE
        b_image, b_p, b_q = pixel(b_m, out_height, out_width)
        b_h, b_w = b_p * STRIDE, b_q * STRIDE
        b_pixel = (b_image * height + b_h) * width + b_w - origin
    p_x = x + origin.to(tl.int64) * channels
    b_offsets = b_pixel[:, None] * channels + b_k[None, :]
    p_w = weight + b_n[None, :] * (TAPS * channels) + b_k[:, None]
    b_filter = b_n < filters

    steps = tl.cdiv(channels, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * steps):
        b_there = b_row
        c = step * BLOCK_K
        offset = c
        w_offset = c
        if TAPS > 1:
            tap = step // steps
            c -= tap * steps * BLOCK_K
            dh, dw = tap // 3 - 1, tap % 3 - 1
            b_there = b_row & (b_h + dh >= 0) & (b_h + dh < height) & (b_w + dw >= 0) & (b_w + dw < width)
            offset = (dh * width + dw) * channels + c
            w_offset = tap * channels + c
        b_c = c + b_k
        mask, w_mask = b_there[:, None], b_filter[None, :]
        if not EVEN:
            mask &= (b_c < channels)[None, :]
            w_mask &= (b_c < channels)[:, None]
        b_x = tl.load(p_x + (b_offsets + offset), mask=mask, other=0.0)
        b_weight = tl.load(p_w + w_offset, mask=w_mask, other=0.0)
        b_a = activation(b_x, stats, b_c, channels, RELU)
        if TAPS > 1 and stats is not None:
            b_a = tl.where(b_there[:, None], b_a, 0.0).to(b_x.dtype)
        b_acc = dot(b_a, b_weight, b_acc, PRECISION)

    b_y = b_acc.to(y.dtype.element_ty)
    p_y = y + first.to(tl.int64) * filters
    b_out = tl.arange(0, BLOCK_M)[:, None] * filters + b_n[None, :]
    tl.store(p_y + b_out, b_y, mask=b_row[:, None] & b_filter[None, :])
    if partial is not None:
        b_f = b_y.to(tl.float32)
        count = tl.minimum(rows - first, BLOCK_M)
        b_mean = tl.sum(tl.where(b_row[:, None], b_f, 0.0), 0) / count
        b_delta = tl.where(b_row[:, None], b_f - b_mean[None, :], 0.0)
        b_m2 = tl.sum(b_delta * b_delta, 0)
        p_partial = partial + tile_m.to(tl.int64) * filters + b_n
        tl.store(p_partial, b_mean, mask=b_filter)
        tl.store(p_partial + tiles_m * filters, b_m2, mask=b_filter)


def conv_fwd(
    x: Tensor,
    stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    filters, channels, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    rows = y.numel() // filters
    config = select(
        "conv_fwd", ConvProblem(rows, channels, filters, taps, x.element_size()), arch_of(x.device)
    )
    tiles = math.ceil(rows / config.block_m)
    partial = None
    if y_stats is not None:
        partial = torch.empty((2, tiles, filters), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_fwd_kernel[(tiles * math.ceil(filters / config.block_n),)](
            *(x, stats, weight, y, partial, rows, *x.shape[2:], *y.shape[2:]),
            *(channels // VEC.value, filters // VEC.value),
            TAPS=taps,
            STRIDE=stride,
            RELU=relu,
            EVEN=channels % config.block_k == 0,
            PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
            **config.keywords,
        )
        if y_stats is not None:
            bn_stats_finalize_kernel[(FINALIZE.column_blocks(filters),)](
                *(None, partial, norm_weight, norm_bias, y_stats),
                *(rows, config.block_m, tiles, filters, eps),
                **FINALIZE.keywords,
            )
