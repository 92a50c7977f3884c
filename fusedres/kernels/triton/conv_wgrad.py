"""conv_wgrad: the gradient of a convolution's weight, between the backwards of two batch norms."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton import config
from fusedres.kernels.triton.common import MEAN, OFFSET, SCALE, SHIFT, SLOPE, affine, load_row, locate, tile
from fusedres.kernels.triton.config import REGISTERS_PER_SM, THREADS_PER_WARP
from fusedres.kernels.triton.conv_common import (
    VEC,
    advance,
    check_sizes,
    direct,
    dot,
    grouped,
    pixel,
    precision,
    without_prologue,
)
from fusedres.kernels.triton.conv_config import ConvConfig, ConvProblem, select


@triton.jit
def padded_activation(b_x, b_scale, b_shift, b_there, RELU: tl.constexpr):
    """relu(x * scale + shift) in x's dtype, but 0 in the rows that aren't there, where x must be 0, too.

    The shift is masked, not the result, and the ReLU is a maximum, where relu(NaN) is NaN: so it becomes
    one instruction with the conversion to 16 bits. A select behind the product would be done on each half.
    """
    b_shift = tl.where(b_there[:, None], b_shift[None, :], 0.0)
    b_u = tl.fma(b_x.to(tl.float32), b_scale[None, :], b_shift)
    if RELU:
        b_u = tl.maximum(b_u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return b_u.to(b_x.dtype)


# partial[s, k, tap, c] = sum of dy[k] * a[c under the tap] over the output positions of split s,
#     dy = scale * du + slope * (y - mean) + offset,  a = relu(x * scale + shift)
# Reads du, y and x again for every tile and tap, the first time from memory, then from the L2 cache: the
# programs of a split come one after the other. Writes a float32 weight for every split.
# A tile is [channels, filters]: the operand that is transposed is held in registers, and x is but one tensor.
# The padding is behind the prologue: 0, not relu(shift). Past the end, too, where the gradient is that of the
# last position again, which unlike offset - slope * mean is surely finite.
@triton.jit(
    do_not_specialize=[
        *("images", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups", "steps"),
    ]
)
def conv_wgrad_partial_kernel(
    du,
    y,
    y_stats,
    y_sums,
    x,
    x_stats,
    partial,
    images,
    height,
    width,
    out_height,
    out_width,
    channel_groups,
    filter_groups,
    steps,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    channels, filters = channel_groups * VEC, filter_groups * VEC
    rows = images * out_height * out_width
    tiles_m, tiles_n = tl.cdiv(channels, BLOCK_M), tl.cdiv(filters, BLOCK_N)
    tile_row, tile_n = grouped(tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    split, tap, tile_m = pixel(tile_row, TAPS, tiles_m)
    b_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = tl.arange(0, BLOCK_K)
    b_channel, b_filter = b_m < channels, b_n < filters

    # what the prologues need is loaded here: out of the loop the compiler takes it for some GPUs only
    if x_stats is not None:
        b_scale = load_row(x_stats, SCALE, b_m, channels)
        b_shift = load_row(x_stats, SHIFT, b_m, channels)
    if y_stats is not None:
        b_y_scale = load_row(y_stats, SCALE, b_n, filters)
    if y_sums is not None:
        b_mean = load_row(y_stats, MEAN, b_n, filters)
        b_slope = load_row(y_sums, SLOPE, b_n, filters)
        b_offset = load_row(y_sums, OFFSET, b_n, filters)

    first = split * steps * BLOCK_K
    if TAPS > 1 or STRIDE > 1:
        b_image, b_p, b_q = pixel(first + b_k, out_height, out_width)
        step_image, step_p, step_q = pixel(BLOCK_K, out_height, out_width)
        dh, dw = 0, 0
        if TAPS > 1:
            dh, dw = tap // 3 - 1, tap % 3 - 1

    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.minimum(steps, tl.cdiv(rows - first, BLOCK_K))):
        start = first + step * BLOCK_K
        base = start.to(tl.int64) * filters
        b_offsets = tl.minimum(b_k, rows - 1 - start)[:, None] * filters + b_n[None, :]
        b_du = tl.load(du + base + b_offsets, mask=b_filter[None, :], other=0.0)
        if y_stats is None:
            b_dy = without_prologue(b_du, b_filter, DIRECT)
        else:
            b_dy = b_y_scale[None, :] * b_du.to(tl.float32)
            if y_sums is not None:
                b_y = tl.load(y + base + b_offsets, mask=b_filter[None, :], other=0.0)
                b_dy += affine(b_y.to(tl.float32) - b_mean[None, :], b_slope, b_offset)
            b_dy = b_dy.to(b_du.dtype)

        b_there = b_k < rows - start
        b_pixel = start + b_k
        if TAPS > 1 or STRIDE > 1:
            b_h, b_w = b_p * STRIDE + dh, b_q * STRIDE + dw
            if TAPS > 1:
                b_there &= (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width)
            b_pixel = (b_image * height + b_h) * width + b_w
            b_image, b_p, b_q = advance(b_image, b_p, b_q, step_image, step_p, step_q, out_height, out_width)
        p_x = x + b_pixel.to(tl.int64)[:, None] * channels + b_m[None, :]
        b_x = tl.load(p_x, mask=b_there[:, None] & b_channel[None, :], other=0.0)
        if x_stats is None:
            b_a = without_prologue(b_x, b_channel, DIRECT)
        else:
            b_a = padded_activation(b_x, b_scale, b_shift, b_there, RELU)

        b_acc = dot(tl.trans(b_a), b_dy, b_acc, PRECISION)

    p_partial = partial + (split.to(tl.int64) * filters * TAPS + tap) * channels
    b_out = b_n[:, None] * (TAPS * channels) + b_m[None, :]
    tl.store(p_partial + b_out, tl.trans(b_acc), mask=b_filter[:, None] & b_channel[None, :])


# dweight[k, c, r, s] = sum of all partial[:, k, 3 * r + s, c], added in a fixed order
# Reads a float32 weight for every split, writes dweight, whatever its dtype and strides.
@triton.jit(do_not_specialize=["splits", "channel_groups", "filter_groups", "to_k", "to_c", "to_r", "to_s"])
def conv_wgrad_finalize_kernel(
    partial,
    dweight,
    splits,
    channel_groups,
    filter_groups,
    to_k,
    to_c,
    to_r,
    to_s,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, filters = channel_groups * VEC, filter_groups * VEC
    values = filters * TAPS * channels
    _, b_v = locate(values, BLOCK_C)
    b_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, splits.to(tl.int64), BLOCK_M):
        base, offsets, mask = tile(first, splits, b_v, values, BLOCK_M)
        b_sum += tl.load(partial + base + offsets, mask=mask, other=0.0)
    b_k, b_tap, b_c = pixel(b_v, TAPS, channels)
    b_out = b_k * to_k + b_c * to_c + b_tap // 3 * to_r + b_tap % 3 * to_s
    tl.store(dweight + b_out, tl.sum(b_sum, 0).to(dweight.dtype.element_ty), mask=b_v < values)


# what a program costs beside its steps, in steps: until its first values are there, and its partial sums,
# written and read again
OVERHEAD = 8
# programs of a multiprocessor one after the other, at most
MAX_WAVES = 12
# partial sums that a program of the finalize kernel adds up
FINALIZED = 1024


class Division(NamedTuple):
    """The output positions, shared among programs."""

    tiles: int  # of channels, filters and taps
    splits: int
    steps: int  # of a split


@functools.lru_cache(maxsize=4096)
def divide(run: ConvConfig, problem: ConvProblem, multiprocessors: int) -> Division:
    """As many splits as keep all ``multiprocessors`` busy to the end, for the least time."""
    registers = run.max_registers * run.num_warps * THREADS_PER_WARP
    at_once = multiprocessors * (REGISTERS_PER_SM // registers)
    tiles = math.ceil(problem.rows / run.block_m) * math.ceil(problem.columns / run.block_n) * problem.taps
    steps = max(1, math.ceil(problem.inner / run.block_k))

    def time(splits: int) -> int:
        return math.ceil(tiles * splits / at_once) * (math.ceil(steps / splits) + OVERHEAD)

    full = (waves * at_once // tiles for waves in range(1, MAX_WAVES + 1))
    splits = min((min(max(1, n), steps) for n in full), key=time)
    each = math.ceil(steps / splits)
    return Division(tiles, math.ceil(steps / each), each)


def conv_wgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    x: Tensor,
    x_stats: Tensor | None,
    relu: bool,
    stride: int,
    dweight: Tensor,
) -> None:
    filters, channels, taps = dweight.shape[0], dweight.shape[1], dweight.shape[2] * dweight.shape[3]
    check_sizes(x.shape, dweight.shape, du.shape)
    arch, multiprocessors = config._facts(x.device)
    problem = ConvProblem(channels, du.numel() // filters, filters, taps, x.element_size())
    run = select("conv_wgrad", problem, arch)
    tiles, splits, steps = divide(run, problem, multiprocessors)
    groups = channels // VEC.value, filters // VEC.value
    values = filters * taps * channels
    partial = torch.empty((splits, values), dtype=torch.float32, device=x.device)
    block_m = min(128, triton.next_power_of_2(splits))
    with torch.cuda.device_of(x):
        conv_wgrad_partial_kernel[(tiles * splits,)](
            *(du, y, y_stats, y_sums, x, x_stats, partial),
            *(x.shape[0], *x.shape[2:], *du.shape[2:], *groups, steps),
            TAPS=taps,
            STRIDE=stride,
            RELU=relu,
            DIRECT=direct(arch, x.element_size()),
            PRECISION=precision(),
            **run.keywords,
        )
        conv_wgrad_finalize_kernel[(math.ceil(values / (FINALIZED // block_m)),)](
            *(partial, dweight, splits, *groups, *dweight.stride()),
            TAPS=taps,
            BLOCK_M=block_m,
            BLOCK_C=FINALIZED // block_m,
            num_warps=4,
        )
