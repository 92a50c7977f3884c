"""conv_fwd: a convolution that consumes a batch norm and leaves the statistics of its output."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.bn_stats import bn_stats_finalize_kernel
from fusedres.kernels.triton.common import tile
from fusedres.kernels.triton.config import INT8_VEC, arch_of, finalize
from fusedres.kernels.triton.conv_common import VEC, activation, check_sizes, dot, grouped, pixel, precision
from fusedres.kernels.triton.conv_config import ConvConfig, ConvProblem, select


@triton.jit
def convolve(
    x,
    stats,
    residual,
    residual_stats,
    z,
    border,
    weight,
    tile_m,
    tile_n,
    rows,
    height,
    width,
    out_height,
    out_width,
    channels,
    filters,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of conv(activation(x)), in float32; one of the first column also writes the activation to z.

    Of 8 bits in int32. Taps and channels are one loop, so that loads of the next tap are under way before
    this one ends. The padding is behind the activation: 0, not relu(shift); with ``border`` it has those
    values, one for each channel. Rows and filters past the end are the last one
    again, so that loads need no mask for them; nobody stores what comes of them. The product is computed
    transposed, filters by positions: so a thread holds many positions of few filters, and statistics of
    filters are sums within threads.
    """
    first = tile_m * BLOCK_M
    b_row = first + tl.arange(0, BLOCK_M) < rows
    b_m = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
    b_n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), filters - 1)
    b_k = tl.arange(0, BLOCK_K)

    if TAPS == 1 and STRIDE == 1:
        origin = first
        b_pixel = b_m - first
    else:
        image, p, q = pixel(first, out_height, out_width)
        origin = (image * height + p * STRIDE) * width + q * STRIDE
        b_image, b_p, b_q = pixel(b_m, out_height, out_width)
        b_h, b_w = b_p * STRIDE, b_q * STRIDE
        b_pixel = (b_image * height + b_h) * width + b_w - origin
    if TAPS > 1:
        # a bit for every tap that lies in the image: tap 3 * row + column
        b_rows = 0o070 + tl.where(b_h > 0, 0o007, 0) + tl.where(b_h < height - 1, 0o700, 0)
        b_columns = 0o222 + tl.where(b_w > 0, 0o111, 0) + tl.where(b_w < width - 1, 0o444, 0)
        b_taps = b_rows & b_columns
    base = origin.to(tl.int64) * channels
    b_offsets = b_pixel[:, None] * channels + b_k[None, :]
    b_w_offsets = b_n[:, None] * (TAPS * channels) + b_k[None, :]

    steps = tl.cdiv(channels, BLOCK_K)
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    c, tap, bit = 0, 0, 1
    for _ in range(TAPS * steps):
        b_c = c + b_k
        b_there = tl.full((BLOCK_M,), True, tl.int1)
        b_exists = tl.full((BLOCK_K,), True, tl.int1)
        offset = c
        if TAPS > 1:
            b_there = ((b_taps >> tap) & 1) != 0
            offset += ((tap // 3 - 1) * width + tap % 3 - 1) * channels
        if not EVEN:
            b_exists = b_c < channels
        if residual is not None:
            # what isn't stored is masked all the same: without it the compiler computes the activation
            # twice, in the layout of the product and in that of z
            b_there = b_row
        b_at = b_offsets + offset
        p_x = x + base + b_at
        if border is not None:
            # another address, and no mask: what a mask fills in goes through registers if it isn't 0
            p_x = tl.where(b_there[:, None], p_x, border + b_c[None, :])
            b_there = tl.full((BLOCK_M,), True, tl.int1)
        mask = b_there[:, None] & b_exists[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0)
        b_residual = None
        if residual is not None:
            b_residual = tl.load(residual + base + b_at, mask=mask, other=0.0)
        b_w_at = b_w_offsets + (tap * channels + c)
        b_weight = tl.load(weight + b_w_at, mask=b_exists[None, :], other=0.0)
        if TAPS > 1:
            # again, from a counter of its own: or the mask stays in registers from its load until here
            b_there = (b_taps & bit) != 0
        b_a = activation(b_x, stats, b_c, channels, RELU, b_residual, residual_stats, b_there)
        if z is not None:
            tl.store(z + base + b_at, b_a, mask=mask & (tile_n == 0))
        b_acc = dot(b_weight, tl.trans(b_a), b_acc, PRECISION)
        c += BLOCK_K
        if TAPS > 1:
            # counters: a division by a number that isn't constant takes longer than the rest
            next_tap = c >= channels
            c = tl.where(next_tap, 0, c)
            tap += next_tap.to(tl.int32)
            bit = tl.where(next_tap, 2 * bit, bit)
    return tl.trans(b_acc)


# y = conv(relu(x * scale + shift (+ residual, or residual * its scale + its shift))),
# partial = mean and sum of (y - mean)^2 over the positions of a tile
# Reads x (and residual; a 3x3 its eight neighbours again, out of the caches) and the weight, writes y and 2K
# floats a tile (and with a residual the convolution's input, z).
@triton.jit(
    do_not_specialize=[
        *("rows", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups"),
    ]
)
def conv_fwd_kernel(
    x,
    stats,
    residual,
    residual_stats,
    weight,
    z,
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
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    channels, filters = channel_groups * VEC, filter_groups * VEC
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m, tile_n = grouped(tiles_m, tl.cdiv(filters, BLOCK_N), GROUP_M)
    b_acc = convolve(
        *(x, stats, residual, residual_stats, z, None, weight, tile_m, tile_n),
        *(rows, height, width, out_height, out_width, channels, filters),
        *(TAPS, STRIDE, RELU, EVEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )

    first = tile_m * BLOCK_M
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    base, offsets, mask = tile(first.to(tl.int64), rows, b_n, filters, BLOCK_M)
    b_y = b_acc.to(y.dtype.element_ty)
    tl.store(y + base + offsets, b_y, mask=mask)
    if partial is not None:
        b_f = b_y.to(tl.float32)
        count = tl.minimum(rows - first, BLOCK_M)
        b_times = tl.full((BLOCK_M,), 1.0, tl.float32)
        if not FULL:
            # rows past the end count 0 times
            b_times = (tl.arange(0, BLOCK_M) < count).to(tl.float32)
        b_mean = tl.sum(b_f * b_times[:, None], 0) / count
        b_delta = (b_f - b_mean[None, :]) * b_times[:, None]
        b_m2 = tl.sum(b_delta * b_delta, 0)
        p_partial = partial + tile_m.to(tl.int64) * filters + b_n
        tl.store(p_partial, b_mean, mask=b_n < filters)
        tl.store(p_partial + tiles_m * filters, b_m2, mask=b_n < filters)


class Launch(NamedTuple):
    """A config applied to a convolution, whose output is ``tiles`` tiles high."""

    config: ConvConfig
    rows: int
    tiles: int
    grid: tuple[int]
    sizes: tuple[int, ...]
    keywords: dict[str, int | bool | str]


def launch(kernel: str, x: Tensor, weight: Tensor, stride: int, out: Tensor) -> Launch:
    """How ``kernel`` convolves ``x``."""
    check_sizes(x.shape, weight.shape, out.shape)
    filters, channels, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    vec = INT8_VEC if x.dtype == torch.int8 else VEC.value
    rows = out.numel() // filters
    config = select(kernel, ConvProblem(rows, channels, filters, taps, x.element_size()), arch_of(x.device))
    tiles = math.ceil(rows / config.block_m)
    return Launch(
        config,
        rows,
        tiles,
        grid=(tiles * math.ceil(filters / config.block_n),),
        sizes=(rows, *x.shape[2:], *out.shape[2:], channels // vec, filters // vec),
        keywords={
            "TAPS": taps,
            "STRIDE": stride,
            "EVEN": channels % config.block_k == 0,
            "PRECISION": precision(),
            **config.keywords,
        },
    )


def conv_fwd(
    x: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    z: Tensor | None,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    run = launch("conv_fwd" if residual is None else "conv_fwd_residual", x, weight, stride, y)
    filters, tiles = weight.shape[0], run.tiles
    partial = None
    if y_stats is not None:
        partial = torch.empty((2, tiles, filters), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_fwd_kernel[run.grid](
            *(x, stats, residual, residual_stats, weight, z, y, partial, *run.sizes),
            RELU=relu,
            FULL=run.rows % run.config.block_m == 0,
            **run.keywords,
        )
        if y_stats is not None:
            merge = finalize(tiles)
            bn_stats_finalize_kernel[(merge.column_blocks(filters),)](
                *(None, partial, norm_weight, norm_bias, y_stats),
                *(run.rows, run.config.block_m, tiles, filters, eps),
                **merge.keywords,
            )
