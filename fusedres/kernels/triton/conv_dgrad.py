"""conv_dgrad: the gradient of a convolution's input, between the backwards of two batch norms."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.bn_act_backward import bn_act_bwd_finalize_kernel
from fusedres.kernels.triton.common import MEAN, input_gradient, load_row, normalise, relu_mask
from fusedres.kernels.triton.config import arch_of, finalize
from fusedres.kernels.triton.conv_common import (
    VEC,
    check_sizes,
    direct,
    dot,
    grouped,
    pixel,
    precision,
    without_prologue,
)
from fusedres.kernels.triton.conv_config import ConvProblem, select


@triton.jit
def flat(image, h, w, height, width):
    """The position of a pixel in [N, height, width]."""
    return (image * height + h) * width + w


@triton.jit
def output_gradient(b_du, b_y, stats, sums, b_k, filters, b_there):
    """The gradient of a batch norm's input in du's dtype, 0 in rows that aren't ``there``.

    du itself without stats.
    """
    b_dy = b_du
    if stats is not None:
        b_g = input_gradient(b_du.to(tl.float32), b_y, stats, sums, b_k, filters)
        if sums is not None:
            # a product: the compiler would move a select behind the conversion, where it is one for each half
            b_g *= b_there.to(tl.float32)[:, None]
        b_dy = b_g.to(b_du.dtype)
    return b_dy


# dx = transposed convolution of dy (+ add), 0 where relu(x * scale + shift) let nothing through, with
#     dy = scale * du + slope * (y - mean) + offset
# partial = sum(dx), sum(dx * (x - mean)) over the pixels of a tile
# Reads du and y (a 3x3 for every tap, out of the caches), the weight, add and x; writes dx, and 2C floats a
# tile. Outside of the image dy is 0, not offset. Rows past the end are the last one again, so that loads need
# no mask for them.
# A tile is BLOCK_M positions of dy and, of the STRIDE * STRIDE pixels of x that belong to each, one: pixels
# at the same place meet the same taps, so that none is wasted. A 3x3's last pixel meets the most and goes
# first; a 1x1 meets the first pixel only, the others get add and the mask. The places of a position follow
# each other, since they read the same dy.
@triton.jit(
    do_not_specialize=[
        *("rows", "height", "width", "out_height", "out_width"),
        *("channel_groups", "filter_groups", "add_groups"),
    ]
)
def conv_dgrad_kernel(
    du,
    y,
    y_stats,
    y_sums,
    weight,
    add,
    x,
    x_stats,
    dx,
    partial,
    rows,
    height,
    width,
    out_height,
    out_width,
    channel_groups,
    filter_groups,
    add_groups,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    COMPACT: tl.constexpr,
    RELU: tl.constexpr,
    DIRECT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    SIDE: tl.constexpr = 1 if TAPS == 1 else 3
    PLACES: tl.constexpr = STRIDE * STRIDE
    channels, filters = channel_groups * VEC, filter_groups * VEC
    tiles_m = tl.cdiv(rows, BLOCK_M) * PLACES
    tile_m, tile_n = grouped(tiles_m, tl.cdiv(channels, BLOCK_N), GROUP_M)
    first = tile_m // PLACES * BLOCK_M
    place = PLACES - 1 - tile_m % PLACES
    down, right = place // STRIDE, place % STRIDE
    b_row = first + tl.arange(0, BLOCK_M) < rows
    b_m = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
    b_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = tl.arange(0, BLOCK_K)
    b_channel = b_n < channels

    origin, b_pixel = first, b_m - first
    if TAPS > 1 or STRIDE > 1 or COMPACT:
        image, p, q = pixel(first, out_height, out_width)
        h, w = p * STRIDE + down, q * STRIDE + right
        b_image, b_p, b_q = pixel(b_m, out_height, out_width)
        b_h, b_w = b_p * STRIDE + down, b_q * STRIDE + right
        if STRIDE > 1:
            origin = flat(image, h, w, height, width)
            b_pixel = flat(b_image, b_h, b_w, height, width) - origin
            b_row &= (b_h < height) & (b_w < width)

    # pixels in row p * STRIDE + down meet tap rows r, r + STRIDE, ... in dy's rows p + dp, p + dp - 1, ...
    dp, dq = (down + SIDE // 2) // STRIDE, (right + SIDE // 2) // STRIDE
    r, s = (down + SIDE // 2) % STRIDE, (right + SIDE // 2) % STRIDE
    taps_h, taps_w = tl.cdiv(SIDE - r, STRIDE), tl.cdiv(SIDE - s, STRIDE)
    if TAPS > 1:
        # a bit for every tap whose dy lies in the image: row 0 meets the one below, row 2 that above (of
        # stride 2: its own)
        b_below, b_above = b_p < out_height - 1, (b_p > 0) | (STRIDE > 1)
        b_after, b_before = b_q < out_width - 1, (b_q > 0) | (STRIDE > 1)
        b_rows = 0o070 + tl.where(b_below, 0o007, 0) + tl.where(b_above, 0o700, 0)
        b_columns = 0o222 + tl.where(b_after, 0o111, 0) + tl.where(b_before, 0o444, 0)
        b_taps = b_rows & b_columns

    start = first.to(tl.int64) * filters
    b_offsets = (b_m - first)[:, None] * filters + b_k[None, :]
    b_w_offsets = b_k[:, None] * (TAPS * channels) + b_n[None, :]
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    k, i, j = 0, 0, 0
    for _ in range(taps_h * taps_w * tl.cdiv(filters, BLOCK_K)):
        b_there = tl.full((BLOCK_M,), True, tl.int1)
        b_exists = tl.full((BLOCK_K,), True, tl.int1)
        offset = k
        w_offset = k * TAPS * channels
        if TAPS > 1:
            tap = (r + i * STRIDE) * SIDE + s + j * STRIDE
            b_there = (b_taps >> tap) & 1 != 0
            offset += ((dp - i) * out_width + dq - j) * filters
            w_offset += tap * channels
        if not EVEN:
            b_exists = k + b_k < filters
        mask = b_there[:, None] & b_exists[None, :]
        b_du = tl.load(du + start + (b_offsets + offset), mask=mask, other=0.0)
        b_y = None
        if y_sums is not None:
            b_y = tl.load(y + start + (b_offsets + offset), mask=mask, other=0.0).to(tl.float32)
        w_mask = b_exists[:, None] & b_channel[None, :]
        b_weight = tl.load(weight + (b_w_offsets + w_offset), mask=w_mask, other=0.0)
        b_weight = without_prologue(b_weight, b_channel, DIRECT)
        b_dy = output_gradient(b_du, b_y, y_stats, y_sums, k + b_k, filters, b_there)
        b_acc = dot(tl.trans(b_weight), tl.trans(b_dy), b_acc, PRECISION)
        k += BLOCK_K
        if TAPS > 1:
            # counters: a division by a number that isn't constant takes longer than the rest
            j += (k >= filters).to(tl.int32)
            k = tl.where(k < filters, k, 0)
            i += (j >= taps_w).to(tl.int32)
            j = tl.where(j < taps_w, j, 0)

    b_acc = tl.trans(b_acc)
    mask = b_row[:, None] & b_channel[None, :]
    if add is not None:
        pitch = add_groups * VEC
        add_origin, b_add_pixel, add_mask = origin, b_pixel, mask
        if COMPACT:
            half_height, half_width = tl.cdiv(height, 2), tl.cdiv(width, 2)
            add_origin = flat(image, h // 2, w // 2, half_height, half_width)
            b_add_pixel = flat(b_image, b_h // 2, b_w // 2, half_height, half_width) - add_origin
            b_even = (b_h % 2 == 0) & (b_w % 2 == 0)
            add_mask = mask & b_even[:, None]
        b_add_offsets = b_add_pixel[:, None] * pitch + b_n[None, :]
        p_add = add + add_origin.to(tl.int64) * pitch + b_add_offsets
        b_acc += tl.load(p_add, mask=add_mask, other=0.0).to(tl.float32)
    b_dx = b_acc.to(dx.dtype.element_ty)
    base = origin.to(tl.int64) * channels
    b_out = b_pixel[:, None] * channels + b_n[None, :]
    if x_stats is not None:
        b_x = tl.load(x + base + b_out, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            b_dx = relu_mask(normalise(b_x, x_stats, b_n, channels).to(x.dtype.element_ty), b_dx)
    tl.store(dx + base + b_out, b_dx, mask=mask)
    if partial is not None:
        b_sum = tl.where(b_row[:, None], b_dx.to(tl.float32), 0.0)
        b_product = b_sum * (b_x - load_row(x_stats, MEAN, b_n, channels)[None, :])
        p_partial = partial + tile_m.to(tl.int64) * channels + b_n
        tl.store(p_partial, tl.sum(b_sum, 0), mask=b_channel)
        tl.store(p_partial + tiles_m * channels, tl.sum(b_product, 0), mask=b_channel)


def pixel_pitch(t: Tensor) -> int:
    """Values from one pixel to the next in channels_last; the stride of a size of 1 means nothing."""
    return next((t.stride(axis) for axis in (3, 2, 0) if t.shape[axis] > 1), t.shape[1])


def conv_dgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    weight: Tensor,
    stride: int,
    add: Tensor | None,
    first: int,
    x: Tensor | None,
    x_stats: Tensor | None,
    relu: bool,
    dx: Tensor,
    x_sums: Tensor | None,
) -> None:
    check_sizes(dx.shape, weight.shape, du.shape)
    filters, channels, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    rows, pixels = du.numel() // filters, dx.numel() // channels
    kernel = "conv_dgrad" if du.element_size() < 4 else "conv_dgrad_fp32"
    problem = ConvProblem(pixels, filters, channels, taps, du.element_size())
    arch = arch_of(du.device)
    config = select(kernel, problem, arch)
    tiles = math.ceil(rows / config.block_m) * stride**2
    pitch, compact, partial = 0, False, None
    if add is not None:
        pitch, compact = pixel_pitch(add), add.shape[2:] != dx.shape[2:]
        add = add[:, first : first + channels]
    if x_sums is not None:
        partial = torch.empty((2, tiles, channels), dtype=torch.float32, device=du.device)
    with torch.cuda.device_of(du):
        conv_dgrad_kernel[(tiles * math.ceil(channels / config.block_n),)](
            *(du, y, y_stats, y_sums, weight, add, x, x_stats, dx, partial),
            *(rows, *dx.shape[2:], *du.shape[2:]),
            *(channels // VEC.value, filters // VEC.value, pitch // VEC.value),
            TAPS=taps,
            STRIDE=stride,
            COMPACT=compact,
            RELU=relu,
            DIRECT=direct(arch, du.element_size()),
            EVEN=filters % config.block_k == 0,
            PRECISION=precision(),
            **config.keywords,
        )
        if x_sums is not None:
            merge = finalize(tiles)
            bn_act_bwd_finalize_kernel[(merge.column_blocks(channels),)](
                *(partial, x_stats, None, x_sums, None),
                *(pixels, tiles, channels),
                **merge.keywords,
            )
