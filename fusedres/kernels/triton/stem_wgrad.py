"""stem_wgrad: the gradient of the weight of stem_conv, out of the packed images that it left."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import locate, tile
from fusedres.kernels.triton.conv_common import VEC, advance, dot, grouped, pixel, precision
from fusedres.kernels.triton.conv_config import ConvProblem
from fusedres.kernels.triton.stem_conv import (
    CHANNELS,
    PACKED,
    ROW,
    SIDE,
    WINDOW,
    append,
    begin,
    choose,
    image_size,
    row_size,
    share,
    window,
)

# partial sums that a program of the finalize kernel adds up at a time
FINALIZED = 1024


# partial[i, k, j] = sum of dy[m, k] * value j of m's window over the output positions m of program i
# Reads dy once and the packed images, every value for 14 positions, all but once out of the caches; writes
# a float32 weight for every program. A program has a tile of filters and all of the window, which it takes
# in pieces of BLOCK_N values: in pieces of a row, neighbouring threads read overlapping windows together.
@triton.jit(do_not_specialize=["rows", "out_height", "out_width", "filter_groups", "steps", "programs"])
def stem_wgrad_partial_kernel(
    dy,
    pixels,
    partial,
    rows,
    out_height,
    out_width,
    filter_groups,
    steps,
    programs,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    PIECES: tl.constexpr = (WINDOW + BLOCK_N - 1) // BLOCK_N
    filters = filter_groups * VEC
    program, tile_m = grouped(programs, tl.cdiv(filters, BLOCK_M), GROUP_M)
    b_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_n, b_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    b_filter = b_m < filters

    first, left, first_image = begin(program, steps, rows, out_height, out_width, BLOCK_K)
    rest = (first - first_image * (out_height * out_width)).to(tl.int32)
    b_image, b_p, b_q = pixel(rest + b_k, out_height, out_width)
    step_image, step_p, step_q = pixel(BLOCK_K, out_height, out_width)
    p_pixels = pixels + first_image * image_size(out_height, out_width)
    p_dy = dy + first * filters

    b_accs = ()
    for _ in tl.static_range(PIECES):
        b_accs = append(b_accs, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    for step in range(steps):
        b_row = (step * BLOCK_K + b_k)[:, None]
        mask = (b_row < left) & b_filter[None, :]
        b_dy = tl.load(p_dy + (b_row * filters + b_m[None, :]), mask=mask, other=0.0)
        b_window = window(b_image, b_p, b_q, out_height, out_width)
        b_image, b_p, b_q = advance(b_image, b_p, b_q, step_image, step_p, step_q, out_height, out_width)
        b_sums = ()
        for i in tl.static_range(PIECES):
            b_j = b_n + i * BLOCK_N
            there = b_row < left
            if (i + 1) * BLOCK_N > WINDOW:
                there &= (b_j < WINDOW)[None, :]
            b_offsets = b_window[:, None] + (b_j // ROW * row_size(out_width) + b_j % ROW)[None, :]
            b_x = tl.load(p_pixels + b_offsets, mask=there, other=0.0)
            b_sums = append(b_sums, dot(tl.trans(b_dy), b_x, b_accs[i], PRECISION))
        b_accs = b_sums

    p_partial = partial + (program.to(tl.int64) * filters + b_m[:, None]) * WINDOW
    for i in tl.static_range(PIECES):
        b_j = (b_n + i * BLOCK_N)[None, :]
        tl.store(p_partial + b_j, b_accs[i], mask=b_filter[:, None] & (b_j < WINDOW))


# dweight[k, c, r, s] = sum of partial[i, k, (r, 1 + s, c)] over all programs i, added in a fixed order
# Reads a float32 weight for every program, writes dweight, of any layout.
@triton.jit(do_not_specialize=["programs", "filters", "stride_k", "stride_c", "stride_r", "stride_s"])
def stem_wgrad_finalize_kernel(
    partial,
    dweight,
    programs,
    filters,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    values = filters * WINDOW
    _, b_v = locate(values, BLOCK_C)
    b_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, programs.to(tl.int64), BLOCK_M):
        base, offsets, mask = tile(first, programs, b_v, values, BLOCK_M)
        b_sum += tl.load(partial + base + offsets, mask=mask, other=0.0)
    b_pixel, b_c = b_v // PACKED, b_v % PACKED
    b_k, b_r, b_s = pixel(b_pixel, SIDE, ROW // PACKED)
    b_s -= 1
    p_dweight = dweight + (b_k * stride_k + b_c * stride_c + b_r * stride_r + b_s * stride_s)
    mask = (b_v < values) & (b_c < CHANNELS) & (b_s >= 0)
    tl.store(p_dweight, tl.sum(b_sum, 0).to(dweight.dtype.element_ty), mask=mask)


def stem_wgrad(dy: Tensor, pixels: Tensor, dweight: Tensor) -> None:
    filters = dy.shape[1]
    rows = dy.numel() // filters
    values = filters * WINDOW.value
    run = choose("stem_wgrad", ConvProblem(filters, rows, WINDOW.value, 1, dy.element_size()), dy.device)
    blocks = math.ceil(filters / run.block_m)
    steps, programs = share(rows, run.block_k, run, blocks, dy.device)
    block_m = min(128, triton.next_power_of_2(programs))
    partial = torch.empty((programs, values), dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        stem_wgrad_partial_kernel[(programs * blocks,)](
            *(dy, pixels, partial, rows, *dy.shape[2:], filters // VEC.value, steps, programs),
            PRECISION=precision(),
            **run.keywords,
        )
        stem_wgrad_finalize_kernel[(math.ceil(values / (FINALIZED // block_m)),)](
            *(partial, dweight, programs, filters, *dweight.stride()),
            BLOCK_M=block_m,
            BLOCK_C=FINALIZED // block_m,
            num_warps=4,
        )
