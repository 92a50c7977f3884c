"""bn_stats and the running statistics: mean and variance of every channel, and what follows from them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import MEAN, RSTD, SCALE, SHIFT, VAR, load_row, locate, tile
from fusedres.kernels.triton.config import FINALIZE, PER_CHANNEL, launch


@triton.jit
def merge(n, b_mean, b_m2, n_other, b_mean_other, b_m2_other):
    """Count, mean and sum of squared deviations of two samples together (Chan et al. 1979)."""
    total = n + n_other
    share = n_other / tl.maximum(total, 1.0)
    b_delta = b_mean_other - b_mean
    return total, b_mean + b_delta * share, b_m2 + b_m2_other + b_delta * (n * share) * b_delta


@triton.jit
def merge_rows(b_n, b_mean, b_m2):
    """The same for all samples along axis 0 at once: first their common mean, then deviations from it."""
    b_share = b_n / tl.sum(b_n, 0)[None, :]
    b_common = tl.sum(b_mean * b_share, 0)
    b_delta = b_mean - b_common[None, :]
    return b_common, tl.sum(b_m2 + b_n * b_delta * b_delta, 0)


@triton.jit
def store_stats(stats, weight, bias, b_mean, b_var, eps, b_c, channels):
    """stats = [mean, var, rstd, scale, shift]; rstd = 1 / sqrt(var + eps), correctly rounded."""
    mask = b_c < channels
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_var + eps))
    b_scale = b_rstd
    if weight is not None:
        b_scale = tl.load(weight + b_c, mask=mask, other=0.0) * b_rstd
    b_shift = -b_mean * b_scale
    if bias is not None:
        b_shift += tl.load(bias + b_c, mask=mask, other=0.0)
    tl.store(stats + MEAN * channels + b_c, b_mean, mask=mask)
    tl.store(stats + VAR * channels + b_c, b_var, mask=mask)
    tl.store(stats + RSTD * channels + b_c, b_rstd, mask=mask)
    tl.store(stats + SCALE * channels + b_c, b_scale, mask=mask)
    tl.store(stats + SHIFT * channels + b_c, b_shift, mask=mask)


@triton.jit
def load_pivot(x, b_c, channels):
    """The first row of x. Statistics are taken of x - pivot, so that a mean far from 0 costs no digits.

    The pivot is one of the values, hence at most sqrt(M) standard deviations away from their mean.
    """
    return tl.load(x + b_c, mask=b_c < channels, other=0.0).to(tl.float32)


# partial[p] = mean and sum of (y - mean)^2 over the rows of program p, y = x - pivot
# Reads x once, writes 2C floats a program. Every element of the tile is a sample of its own that takes
# in one row a step, so the loop needs no exchange between threads; the samples are merged behind it.
@triton.jit(do_not_specialize=["rows", "channel_groups", "steps", "programs"])
def bn_stats_partial_kernel(
    x,
    partial,
    rows,
    channel_groups,
    steps,
    programs,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_groups * VEC
    program, b_c = locate(channels, BLOCK_C)
    first = program * steps * BLOCK_M
    b_pivot = load_pivot(x, b_c, channels)
    n = 0.0
    b_mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(steps):
        base, offsets, mask = tile(first + step * BLOCK_M, rows, b_c, channels, BLOCK_M)
        b_y = tl.load(x + base + offsets, mask=mask).to(tl.float32) - b_pivot[None, :]
        # a row past the end repeats the mean, which changes neither mean nor deviations
        n, b_mean, b_m2 = merge(n, b_mean, b_m2, 1.0, tl.where(mask, b_y, b_mean), 0.0)

    b_left = rows - first - tl.arange(0, BLOCK_M)
    b_n = tl.minimum(tl.maximum(tl.cdiv(b_left, BLOCK_M), 0), steps).to(tl.float32)
    b_common, b_total_m2 = merge_rows(b_n[:, None], b_mean, b_m2)
    p_partial = partial + program * channels + b_c
    tl.store(p_partial, b_common, mask=b_c < channels)
    tl.store(p_partial + programs * channels, b_total_m2, mask=b_c < channels)


# stats from all partials, merged in a fixed order
# Reads 2C floats a program, and the pivot where means were taken from x's; writes 5C floats.
@triton.jit(do_not_specialize=["rows", "rows_per_program", "programs", "channels"])
def bn_stats_finalize_kernel(
    x,
    partial,
    weight,
    bias,
    stats,
    rows,
    rows_per_program,
    programs,
    channels,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, b_c = locate(channels, BLOCK_C)
    b_n = tl.zeros((BLOCK_M, 1), tl.float32)
    b_mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, programs.to(tl.int64), BLOCK_M):
        base, offsets, mask = tile(first, programs, b_c, channels, BLOCK_M)
        p_partial = partial + base + offsets
        b_left = rows - (first + tl.arange(0, BLOCK_M)).to(tl.int64) * rows_per_program
        b_new = tl.minimum(tl.maximum(b_left, 0), rows_per_program).to(tl.float32)[:, None]
        b_mean_new = tl.load(p_partial, mask=mask, other=0.0)
        b_m2_new = tl.load(p_partial + programs * channels, mask=mask, other=0.0)
        b_n, b_mean, b_m2 = merge(b_n, b_mean, b_m2, b_new, b_mean_new, b_m2_new)
    b_common, b_total_m2 = merge_rows(b_n, b_mean, b_m2)
    if x is not None:
        b_common += load_pivot(x, b_c, channels)
    store_stats(stats, weight, bias, b_common, b_total_m2 / rows, eps, b_c, channels)


# stats from the running mean and variance
# Reads 4C floats, writes 5C.
@triton.jit(do_not_specialize=["channels"])
def bn_running_stats_kernel(
    running_mean, running_var, weight, bias, stats, channels, eps, BLOCK_C: tl.constexpr
):
    _, b_c = locate(channels, BLOCK_C)
    b_mean = tl.load(running_mean + b_c, mask=b_c < channels, other=0.0)
    b_var = tl.load(running_var + b_c, mask=b_c < channels, other=0.0)
    store_stats(stats, weight, bias, b_mean, b_var, eps, b_c, channels)


@triton.jit
def lerp(b_start, b_end, weight):
    """torch.lerp: exactly ``b_end`` at weight 1."""
    b_delta = b_end - b_start
    return tl.where(weight < 0.5, b_start + weight * b_delta, b_end - b_delta * (1.0 - weight))


# running = running + momentum * (batch - running), in place; the variance is made unbiased
# Reads 4C floats, writes 2C.
@triton.jit(do_not_specialize=["channels"])
def bn_update_running_kernel(
    running_mean, running_var, stats, channels, unbias, momentum, BLOCK_C: tl.constexpr
):
    _, b_c = locate(channels, BLOCK_C)
    mask = b_c < channels
    b_mean = tl.load(running_mean + b_c, mask=mask)
    b_var = tl.load(running_var + b_c, mask=mask)
    b_batch_mean = load_row(stats, MEAN, b_c, channels)
    b_batch_var = load_row(stats, VAR, b_c, channels) * unbias
    tl.store(running_mean + b_c, lerp(b_mean, b_batch_mean, momentum), mask=mask)
    tl.store(running_var + b_c, lerp(b_var, b_batch_var, momentum), mask=mask)


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    channels = x.shape[1]
    run = launch("bn_stats", x)
    rows_per_program = run.steps * run.config.block_m
    partial = torch.empty((2, run.programs, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_stats_partial_kernel[run.grid](
            x, partial, run.rows, run.channel_groups, run.steps, run.programs, **run.keywords
        )
        bn_stats_finalize_kernel[(FINALIZE.column_blocks(channels),)](
            *(x, partial, weight, bias, out),
            *(run.rows, rows_per_program, run.programs, channels, eps),
            **FINALIZE.keywords,
        )


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    channels = running_mean.shape[0]
    with torch.cuda.device_of(running_mean):
        bn_running_stats_kernel[(PER_CHANNEL.column_blocks(channels),)](
            *(running_mean, running_var, weight, bias, out, channels, eps),
            BLOCK_C=PER_CHANNEL.block_c,
            num_warps=PER_CHANNEL.num_warps,
        )


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    channels, unbias = running_mean.shape[0], count / (count - 1)
    with torch.cuda.device_of(running_mean):
        bn_update_running_kernel[(PER_CHANNEL.column_blocks(channels),)](
            *(running_mean, running_var, stats, channels, unbias, momentum),
            BLOCK_C=PER_CHANNEL.block_c,
            num_warps=PER_CHANNEL.num_warps,
        )
