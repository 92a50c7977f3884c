"""The backward of bn_act in two passes: sums over all rows, then the gradient of x.

With du the gradient behind the ReLU (0 where the stored output is <= 0):

    dbias = sum(du),  dweight = sum(du * (x - mean)) * rstd
    dx = scale * (du - (dbias + (x - mean) * rstd * dweight) / M)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import (
    DBIAS,
    DWEIGHT,
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    affine,
    load_row,
    locate,
    relu_mask,
    tile,
)
from fusedres.kernels.triton.config import FINALIZE, launch


# partial[p] = sum(du), sum(du * (x - mean)) over the rows of program p, and du where it is wanted
# Reads grad and x (and z, or the ReLU's mask is computed again from x), writes 2C floats a program
# (and du, which may be grad). Sums stay with their element of the tile until the loop ends, so the
# loop needs no exchange between threads.
@triton.jit(do_not_specialize=["rows", "channel_groups", "steps"])
def bn_act_bwd_partial_kernel(
    grad,
    x,
    z,
    stats,
    du,
    partial,
    rows,
    channel_groups,
    steps,
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
    b_dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(steps):
        base, offsets, mask = tile(first + step * BLOCK_M, rows, b_c, channels, BLOCK_M)
        b_g = tl.load(grad + base + offsets, mask=mask, other=0.0)
        b_x = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
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
        # 0 * (0 - mean) of a row past the end is no 0 if the mean isn't finite
        b_dweight = tl.where(mask, tl.fma(b_du, b_x - b_mean[None, :], b_dweight), b_dweight)

    p_partial = partial + program * 2 * channels + b_c
    tl.store(p_partial + DBIAS * channels, tl.sum(b_dbias, 0), mask=b_c < channels)
    tl.store(p_partial + DWEIGHT * channels, tl.sum(b_dweight, 0), mask=b_c < channels)


# sums = [dbias, dweight] from all partials, added in a fixed order
# Reads 2C floats a program, writes 2C floats.
@triton.jit(do_not_specialize=["programs", "channels"])
def bn_act_bwd_finalize_kernel(
    partial, stats, sums, programs, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    _, b_c = locate(channels, BLOCK_C)
    b_dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, programs.to(tl.int64), BLOCK_M):
        base, offsets, mask = tile(first, programs, b_c, 2 * channels, BLOCK_M)
        mask = mask & (b_c < channels)[None, :]
        p_partial = partial + base + offsets
        b_dbias += tl.load(p_partial + DBIAS * channels, mask=mask, other=0.0)
        b_dweight += tl.load(p_partial + DWEIGHT * channels, mask=mask, other=0.0)
    mask = b_c < channels
    tl.store(sums + DBIAS * channels + b_c, tl.sum(b_dbias, 0), mask=mask)
    b_rstd = load_row(stats, RSTD, b_c, channels)
    tl.store(sums + DWEIGHT * channels + b_c, tl.sum(b_dweight, 0) * b_rstd, mask=mask)


# dx = scale * du, and with sums - scale * (dbias + (x - mean) * rstd * dweight) / M
# Reads grad (and x), writes dx, which may be grad. Never divides by the weight, which may be 0.
@triton.jit(do_not_specialize=["rows", "channel_groups"])
def bn_act_bwd_apply_kernel(
    grad,
    x,
    stats,
    sums,
    dx,
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
    if RELU or sums is not None:
        b_x = tl.load(x + base + offsets, mask=mask).to(tl.float32)
    b_scale = load_row(stats, SCALE, b_c, channels)
    if RELU:
        b_z = affine(b_x, b_scale, load_row(stats, SHIFT, b_c, channels)).to(x.dtype.element_ty)
        b_g = relu_mask(b_z, b_g)
    b_dx = b_scale[None, :] * b_g.to(tl.float32)
    if sums is not None:
        b_per_value = -b_scale / rows
        b_slope = b_per_value * load_row(stats, RSTD, b_c, channels) * load_row(sums, DWEIGHT, b_c, channels)
        b_offset = b_per_value * load_row(sums, DBIAS, b_c, channels)
        b_centred = b_x - load_row(stats, MEAN, b_c, channels)[None, :]
        b_dx += tl.fma(b_slope[None, :], b_centred, b_offset[None, :])
    tl.store(dx + base + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


def bn_act_backward_reduce(
    grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool, du: Tensor | None, sums: Tensor
) -> None:
    channels = x.shape[1]
    rows = x.numel() // channels
    config, vec, steps, programs, grid = launch(
        "bn_act_backward_reduce", rows, channels, x.element_size(), x.device
    )
    partial = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        bn_act_bwd_partial_kernel[grid](
            grad,
            x,
            z,
            stats,
            du,
            partial,
            rows,
            channels // vec,
            steps,
            RELU=relu,
            VEC=vec,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            maxnreg=config.max_registers(vec),
        )
        bn_act_bwd_finalize_kernel[(triton.cdiv(channels, FINALIZE.block_c),)](
            partial,
            stats,
            sums,
            programs,
            channels,
            BLOCK_M=FINALIZE.block_m,
            BLOCK_C=FINALIZE.block_c,
            num_warps=FINALIZE.num_warps,
        )


def bn_act_backward_apply(
    grad: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, relu: bool, out: Tensor
) -> None:
    channels = x.shape[1]
    rows = x.numel() // channels
    config, vec, _, _, grid = launch("bn_act_backward_apply", rows, channels, x.element_size(), x.device)
    with torch.cuda.device_of(x):
        bn_act_bwd_apply_kernel[grid](
            grad,
            x,
            stats,
            sums,
            out,
            rows,
            channels // vec,
            RELU=relu,
            VEC=vec,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
