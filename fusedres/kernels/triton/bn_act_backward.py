"""The backward of bn_act in two passes: sums over all rows, then the gradient of x.

With du the gradient behind the ReLU (0 where the stored output is <= 0):

    dbias = sum(du),  dweight = sum(du * (x - mean)) * rstd
    dx = scale * (du - (dbias + (x - mean) * rstd * dweight) / M)
       = scale * du + slope * (x - mean) + offset

The sums' own pass ends with slope and offset, so that whoever needs dx multiplies and adds.

A residual that has statistics of its own is a second x: its sums and its gradient come out of the same
passes over du.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import (
    MEAN,
    SCALE,
    SHIFT,
    add_product,
    affine,
    input_gradient,
    load_row,
    locate,
    normalise,
    relu_mask,
    store_sums,
    tile,
)
from fusedres.kernels.triton.config import FINALIZE, launch


# partial[p] = sum(du), sum(du * (x - mean)) (, the same of the residual) over the rows of program p, and
# du where it is wanted
# Reads grad and x (and residual; and z, or the ReLU's mask is computed again from x), writes 2C or 3C
# floats a program (and du, which may be grad). Sums stay with their element of the tile until the loop
# ends, so the loop needs no exchange between threads.
@triton.jit(do_not_specialize=["rows", "channel_groups", "steps", "programs"])
def bn_act_bwd_partial_kernel(
    grad,
    x,
    z,
    stats,
    residual,
    residual_stats,
    du,
    partial,
    rows,
    channel_groups,
    steps,
    programs,
    RELU: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_groups * VEC
    program, b_c = locate(channels, BLOCK_C)
    first = program * steps * BLOCK_M
    b_mean = load_row(stats, MEAN, b_c, channels)
    b_scale = load_row(stats, SCALE, b_c, channels)
    b_shift = load_row(stats, SHIFT, b_c, channels)
    b_dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if residual is not None:
        b_residual_mean = load_row(residual_stats, MEAN, b_c, channels)
        b_residual_product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(steps):
        base, offsets, mask = tile(first + step * BLOCK_M, rows, b_c, channels, BLOCK_M)
        b_g = tl.load(grad + base + offsets, mask=mask, other=0.0)
        b_x = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            b_r = tl.load(residual + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            if z is None:
                b_z = affine(b_x, b_scale, b_shift).to(x.dtype.element_ty)
            else:
                b_z = tl.load(z + base + offsets, mask=mask, other=0.0)
            b_g = relu_mask(b_z, b_g)
        if du is not None:
            tl.store(du + base + offsets, b_g, mask=mask)
        b_du = b_g.to(tl.float32)
        b_dbias += b_du
        b_product = add_product(b_product, b_du, b_x, b_mean, mask)
        if residual is not None:
            b_residual_product = add_product(b_residual_product, b_du, b_r, b_residual_mean, mask)

    p_partial = partial + program * channels + b_c
    tl.store(p_partial, tl.sum(b_dbias, 0), mask=b_c < channels)
    tl.store(p_partial + programs * channels, tl.sum(b_product, 0), mask=b_c < channels)
    if residual is not None:
        p_residual = p_partial + 2 * programs * channels
        tl.store(p_residual, tl.sum(b_residual_product, 0), mask=b_c < channels)


# sums (and residual_sums) from all partials, added in a fixed order: see store_sums
# Reads 2C or 3C floats a program, writes 4C or 8C floats.
@triton.jit(do_not_specialize=["rows", "programs", "channels"])
def bn_act_bwd_finalize_kernel(
    partial,
    stats,
    residual_stats,
    sums,
    residual_sums,
    rows,
    programs,
    channels,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, b_c = locate(channels, BLOCK_C)
    b_dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_residual_product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, programs.to(tl.int64), BLOCK_M):
        base, offsets, mask = tile(first, programs, b_c, channels, BLOCK_M)
        p_partial = partial + base + offsets
        b_dbias += tl.load(p_partial, mask=mask, other=0.0)
        b_product += tl.load(p_partial + programs * channels, mask=mask, other=0.0)
        if residual_sums is not None:
            b_residual_product += tl.load(p_partial + 2 * programs * channels, mask=mask, other=0.0)
    b_dbias = tl.sum(b_dbias, 0)
    store_sums(sums, stats, b_dbias, tl.sum(b_product, 0), rows, b_c, channels)
    if residual_sums is not None:
        b_product = tl.sum(b_residual_product, 0)
        store_sums(residual_sums, residual_stats, b_dbias, b_product, rows, b_c, channels)


# dx, and dresidual where the residual has statistics of its own: see input_gradient
# Reads grad (and x and residual), writes dx (and dresidual). dx may be grad. Never divides by the weight,
# which may be 0.
@triton.jit(do_not_specialize=["rows", "channel_groups"])
def bn_act_bwd_apply_kernel(
    grad,
    x,
    stats,
    sums,
    residual,
    residual_stats,
    residual_sums,
    dx,
    dresidual,
    rows,
    channel_groups,
    RELU: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_groups * VEC
    program, b_c = locate(channels, BLOCK_C)
    base, offsets, mask = tile(program * BLOCK_M, rows, b_c, channels, BLOCK_M)

    b_g = tl.load(grad + base + offsets, mask=mask)
    # behind fixed statistics nobody needs x or residual, and the compiler leaves their loads out
    b_x = tl.load(x + base + offsets, mask=mask).to(tl.float32)
    if residual is not None:
        b_r = tl.load(residual + base + offsets, mask=mask).to(tl.float32)
    if RELU:
        b_g = relu_mask(normalise(b_x, stats, b_c, channels).to(x.dtype.element_ty), b_g)
    b_du = b_g.to(tl.float32)
    b_dx = input_gradient(b_du, b_x, stats, sums, b_c, channels)
    if residual is not None:
        b_dr = input_gradient(b_du, b_r, residual_stats, residual_sums, b_c, channels)
        tl.store(dresidual + base + offsets, b_dr.to(dresidual.dtype.element_ty), mask=mask)
    tl.store(dx + base + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    du: Tensor | None,
    sums: Tensor,
    residual_sums: Tensor | None,
) -> None:
    channels = x.shape[1]
    run = launch("bn_act_backward_reduce", x, residual_stats)
    count = 2 if residual is None else 3
    partial = torch.empty((count, run.programs, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_act_bwd_partial_kernel[run.grid](
            *(grad, x, z, stats, residual, residual_stats, du, partial),
            *(run.rows, run.channel_groups, run.steps, run.programs),
            RELU=relu,
            **run.keywords,
        )
        bn_act_bwd_finalize_kernel[(FINALIZE.column_blocks(channels),)](
            *(partial, stats, residual_stats, sums, residual_sums),
            *(run.rows, run.programs, channels),
            **FINALIZE.keywords,
        )


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
    dx: Tensor,
    dresidual: Tensor | None,
) -> None:
    run = launch("bn_act_backward_apply", x, residual_stats)
    with torch.cuda.device_of(x):
        bn_act_bwd_apply_kernel[run.grid](
            *(grad, x, stats, sums, residual, residual_stats, residual_sums, dx, dresidual),
            *(run.rows, run.channel_groups),
            RELU=relu,
            **run.keywords,
        )
