"""stem_conv: the 7x7 convolution with stride 2 of an image's three channels, and its output's statistics.

A row of the window has 21 values, which suits no access and no tensor core. So the image is packed first:
[N, 2P + 5, 2Q + 6, 4], with a border and a fourth channel of zeros. Output (p, q) then reads, of each of the
seven rows from 2p on, the eight pixels from 2q on: ROW values in one piece that 16-byte accesses fit, with no
border to mind. The first of the eight pixels and the fourth channel meet weights of 0. (So a pixel that is
not finite reaches one output more on its right.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton import config
from fusedres.kernels.triton.bn_stats import bn_stats_finalize_kernel, merge, merge_rows
from fusedres.kernels.triton.config import FINALIZE, REGISTERS_PER_SM, THREADS_PER_WARP, arch_of
from fusedres.kernels.triton.conv_common import VEC, advance, dot, grouped, pixel, precision
from fusedres.kernels.triton.conv_config import ConvConfig, ConvProblem, select

CHANNELS = tl.constexpr(3)
SIDE = tl.constexpr(7)
PADDING = 3
PACKED = tl.constexpr(4)  # values of a packed pixel
WIDTH = tl.constexpr(8)  # pixels of a row of the window
ROW = tl.constexpr(WIDTH.value * PACKED.value)
WINDOW = tl.constexpr(SIDE.value * ROW.value)
APART = tl.constexpr(2 * PACKED.value)  # values between the windows of neighbours
# the packing kernel's tile
PACK_ROWS, PACK_COLUMNS, PACK_WARPS = 8, 128, 4
# compute capabilities whose tensor cores read two-byte operands out of shared memory (wgmma, tcgen05);
# elsewhere, and in float32, they come out of registers (mma.sync)
FROM_SHARED_MEMORY = ((9, 0), (10, 0))


@triton.jit
def append(values, value):
    return values + (value,)


@triton.jit
def row_size(out_width):
    """Values of a row of a packed image."""
    return (2 * (out_width - 1) + WIDTH) * PACKED


@triton.jit
def image_size(out_height, out_width):
    """Values of a packed image."""
    return (2 * (out_height - 1) + SIDE) * row_size(out_width)


@triton.jit
def begin(program, steps, rows, out_height, out_width, BLOCK: tl.constexpr):
    """Where a program's ``steps * BLOCK`` output positions begin, how many exist, and their first image.

    Positions and windows are int32 from there: a program has a hundredth of what fits into memory.
    """
    first = program.to(tl.int64) * steps * BLOCK
    return first, tl.minimum(rows - first, steps * BLOCK).to(tl.int32), first // (out_height * out_width)


@triton.jit
def window(b_image, b_p, b_q, out_height, out_width):
    """Where the window of output [b_image, b_p, b_q] begins in the packed images."""
    row = row_size(out_width)
    return b_image * image_size(out_height, out_width) + b_p * (2 * row) + b_q * APART


# packed[n, top + h, left + w, c] = x[n, c, h, w], and 0 elsewhere
# Reads x, of any layout, and writes packed, which has a fourth channel and a border.
@triton.jit(do_not_specialize=["packed_height", "packed_width"])
def stem_pack_kernel(
    x,
    packed,
    height,
    width,
    packed_height,
    packed_width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tiles_h, tiles_w = tl.cdiv(packed_height, BLOCK_H), tl.cdiv(packed_width, BLOCK_W)
    image, tile_h, tile_w = pixel(tl.program_id(0), tiles_h, tiles_w)
    b_row = (tile_h * BLOCK_H + tl.arange(0, BLOCK_H))[:, None, None]
    b_column = (tile_w * BLOCK_W + tl.arange(0, BLOCK_W))[None, :, None]
    b_c = tl.arange(0, PACKED)[None, None, :]
    b_h, b_w = b_row - TOP, b_column - LEFT

    p_x = x + image.to(tl.int64) * stride_n + b_c.to(tl.int64) * stride_c
    inside = (b_h >= 0) & (b_h < height) & (b_w >= 0) & (b_w < width) & (b_c < CHANNELS)
    b_x = tl.load(p_x + (b_h.to(tl.int64) * stride_h + b_w.to(tl.int64) * stride_w), mask=inside, other=0.0)
    p_packed = packed + image.to(tl.int64) * (packed_height * packed_width * PACKED)
    mask = (b_row < packed_height) & (b_column < packed_width)
    b_out = (b_row * packed_width + b_column) * PACKED + b_c
    tl.store(p_packed + b_out, b_x.to(packed.dtype.element_ty), mask=mask)


# y[m, k] = sum of weight[k, r] * row r of m's window, partial = mean and sum of (y - mean)^2 over the output
# positions m of a program
# Reads the packed images, every value for 14 outputs, all but once out of the caches; writes y and 2K floats
# a program. The weight stays in shared memory. A program has many tiles, one after the other: the windows of
# the next are under way while y is stored, and every element of the tile is a sample of its own for the
# statistics, so that the loop needs no exchange between threads for them.
@triton.jit(do_not_specialize=["rows", "out_height", "out_width", "filter_groups", "steps", "programs"])
def stem_conv_kernel(
    pixels,
    weight,
    y,
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
    tl.static_assert(BLOCK_K == ROW)
    filters = filter_groups * VEC
    program, tile_n = grouped(programs, tl.cdiv(filters, BLOCK_N), GROUP_M)
    b_m, b_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_filter = b_n < filters

    b_weights = ()
    for r in tl.static_range(SIDE):
        p_weight = weight + b_n[None, :] * WINDOW + (b_k + r * ROW)[:, None]
        b_weights = append(b_weights, tl.load(p_weight, mask=b_filter[None, :], other=0.0))

    first, left, first_image = begin(program, steps, rows, out_height, out_width, BLOCK_M)
    rest = (first - first_image * (out_height * out_width)).to(tl.int32)
    b_image, b_p, b_q = pixel(rest + b_m, out_height, out_width)
    step_image, step_p, step_q = pixel(BLOCK_M, out_height, out_width)
    p_pixels = pixels + first_image * image_size(out_height, out_width)
    p_y = y + first * filters

    n = 0.0
    b_mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_m2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        b_row = (step * BLOCK_M + b_m)[:, None]
        b_window = window(b_image, b_p, b_q, out_height, out_width)
        b_image, b_p, b_q = advance(b_image, b_p, b_q, step_image, step_p, step_q, out_height, out_width)
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in tl.static_range(SIDE):
            b_offsets = (b_window + row_size(out_width) * r)[:, None] + b_k[None, :]
            b_x = tl.load(p_pixels + b_offsets, mask=b_row < left, other=0.0)
            b_acc = dot(b_x, b_weights[r], b_acc, PRECISION)
        b_y = b_acc.to(y.dtype.element_ty)
        # always so; but what stands in a branch comes after the loads for the next step
        if left > 0:
            mask = (b_row < left) & b_filter[None, :]
            tl.store(p_y + (b_row * filters + b_n[None, :]), b_y, mask=mask)
            if partial is not None:
                # a row past the end repeats the mean, which changes neither mean nor deviations
                b_sample = tl.where(b_row < left, b_y.to(tl.float32), b_mean)
                n, b_mean, b_m2 = merge(n, b_mean, b_m2, 1.0, b_sample, 0.0)

    if partial is not None:
        b_count = tl.minimum(tl.maximum(tl.cdiv(left - b_m, BLOCK_M), 0), steps).to(tl.float32)
        b_common, b_total_m2 = merge_rows(b_count[:, None], b_mean, b_m2)
        p_partial = partial + program.to(tl.int64) * filters + b_n
        tl.store(p_partial, b_common, mask=b_filter)
        tl.store(p_partial + programs * filters, b_total_m2, mask=b_filter)


def pack(x: Tensor, packed: Tensor, top: int, left: int) -> None:
    """Lay ``x`` [N, 3, H, W] out as ``packed`` [N, rows, columns, 4], from ``top`` and ``left`` on."""
    n, height, width, _ = packed.shape
    grid = n * math.ceil(height / PACK_ROWS) * math.ceil(width / PACK_COLUMNS)
    stem_pack_kernel[(grid,)](
        *(x, packed, *x.shape[2:], height, width, *x.stride()),
        TOP=top,
        LEFT=left,
        BLOCK_H=PACK_ROWS,
        BLOCK_W=PACK_COLUMNS,
        num_warps=PACK_WARPS,
    )


def table(kernel: str, itemsize: int, arch: tuple[int, int]) -> str:
    """The name of the launch settings of ``kernel``."""
    return kernel if itemsize == 2 and arch in FROM_SHARED_MEMORY else f"{kernel}_sync"


def choose(kernel: str, problem: ConvProblem, device: torch.device) -> ConvConfig:
    """The launch setting of ``kernel`` on ``device``."""
    arch = arch_of(device)
    return select(table(kernel, problem.itemsize, arch), problem, arch)


def share(rows: int, block: int, run: ConvConfig, blocks: int, device: torch.device) -> tuple[int, int]:
    """Steps of ``block`` rows that a program takes, and how many programs that makes.

    Each is there for ``blocks`` blocks of filters; together they fill ``device`` once.
    """
    _, multiprocessors = config._facts(device)
    at_once = multiprocessors * (REGISTERS_PER_SM // (run.max_registers * run.num_warps * THREADS_PER_WARP))
    tiles = math.ceil(rows / block)
    steps = math.ceil(tiles / max(1, at_once // blocks))
    return steps, math.ceil(tiles / steps)


def stem_conv(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    pixels: Tensor,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    filters = y.shape[1]
    rows = y.numel() // filters
    problem = ConvProblem(rows, ROW.value, filters, SIDE.value, y.element_size())
    run = choose("stem_conv", problem, x.device)
    blocks = math.ceil(filters / run.block_n)
    steps, programs = share(rows, run.block_m, run, blocks, x.device)
    packed_weight = pixels.new_empty((filters, SIDE.value, WIDTH.value, PACKED.value))
    partial = None
    if y_stats is not None:
        partial = torch.empty((2, programs, filters), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        pack(x, pixels, PADDING, PADDING + 1)
        pack(weight, packed_weight, 0, 1)
        stem_conv_kernel[(programs * blocks,)](
            *(pixels, packed_weight, y, partial, rows, *y.shape[2:], filters // VEC.value, steps, programs),
            PRECISION=precision(),
            **run.keywords,
        )
        if y_stats is not None:
            bn_stats_finalize_kernel[(FINALIZE.column_blocks(filters),)](
                *(None, partial, norm_weight, norm_bias, y_stats),
                *(rows, steps * run.block_m, programs, filters, eps),
                **FINALIZE.keywords,
            )
