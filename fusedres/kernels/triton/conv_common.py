"""What the convolution kernels share: where a tile lies, what flows into it, and its product.

Activations are [N, C, H, W] in channels_last, in memory a row-major matrix [N*H*W, C]; weights are
[K, C, R, S] in channels_last, in memory [K, R*S, C]. A convolution is a matrix product whose reduction
runs over taps and channels (implicit GEMM). C and K are multiples of VEC, so that every access is 16 bytes
of a two-byte dtype.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from fusedres.kernels.triton import config
from fusedres.kernels.triton.common import normalise

VEC = tl.constexpr(config.VEC)
# Triton's interpreter multiplies the bits of bf16: there, operands are widened, which changes no product
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def grouped(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile (row, column): GROUP_M rows of tiles, column by column, then the next.

    Programs that run at the same time so share operands in the L2 cache.
    """
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles_n
    first = (pid // in_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % in_group) % height, (pid % in_group) // height


@triton.jit
def pixel(b_m, height, width):
    """Image, row and column of the position ``b_m`` in [N, height, width]."""
    per_image = height * width
    b_rest = b_m % per_image
    return b_m // per_image, b_rest // width, b_rest % width


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def activation(b_x, stats, b_c, channels, RELU: tl.constexpr):
    """relu(x * scale + shift) in x's dtype: what a batch norm has left to be done; x itself without stats."""
    if stats is not None:
        b_u = normalise(b_x.to(tl.float32), stats, b_c, channels)
        if RELU:
            b_u = tl.where(b_u <= 0, 0.0, b_u)  # relu(NaN) is NaN
        b_x = b_u.to(b_x.dtype)
    return b_x
