"""What the convolution kernels share: where a tile lies, what flows into it, and its product.

Activations are [N, C, H, W] in channels_last, in memory a row-major matrix [N*H*W, C]; weights are
[K, C, R, S] in channels_last, in memory [K, R*S, C]. A convolution is a matrix product whose reduction
runs over taps and channels (implicit GEMM). C and K are multiples of VEC, so that every access is 16 bytes
of a two-byte dtype; of INT8_VEC for those of 8 bits.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from fusedres.kernels.triton import config
from fusedres.kernels.triton.common import normalise

VEC = tl.constexpr(config.VEC)
# Triton's interpreter multiplies the bits of bf16: there, operands are widened, which changes no product
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
MAX_BLOCK_M = 256


def check_sizes(x: torch.Size, weight: torch.Size, out: torch.Size) -> None:
    """Positions, elements of the weight, and offsets from the first position of a tile are int32.

    Args:
        x: shape of the input.
        weight: shape of the weight.
        out: shape of the output.

    Raises:
        ValueError: one of them is too large.
    """
    positions = max(x.numel() // x[1], out.numel() // out[1])
    # a tile of stride 2 lies on four times its pixels; it begins and ends inside of rows, a tap is a row away
    pixels = 4 * MAX_BLOCK_M + 6 * (x[3] + 1)
    if max(positions + MAX_BLOCK_M, weight.numel(), pixels * max(x[1], out[1])) >= 2**31:
        raise ValueError(f"too large for int32: x {list(x)}, weight {list(weight)}, output {list(out)}")


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
def advance(b_image, b_row, b_column, images, rows, columns, height, width):
    """The position [b_image, b_row, b_column] in [N, height, width], moved on by [images, rows, columns].

    An addition of digits: cheaper than the divisions of ``pixel``.
    """
    b_column += columns
    b_carry = b_column >= width
    b_column = tl.where(b_carry, b_column - width, b_column)
    b_row += rows + b_carry.to(tl.int32)
    b_carry = b_row >= height
    b_row = tl.where(b_carry, b_row - height, b_row)
    return b_image + images + b_carry.to(tl.int32), b_row, b_column


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        if b_acc.dtype == tl.int32:
            # the sums of a step are exact in float32; numpy takes 70 times as long for them in integers
            return b_acc + tl.dot(b_a, b_b).to(tl.int32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def activation(
    b_x, stats, b_c, channels, RELU: tl.constexpr, b_residual=None, residual_stats=None, b_there=None
):
    """relu(x * scale + shift (+ residual, or residual * its scale + its shift)) in x's dtype, 0 in rows that
    aren't ``there``: what a batch norm has left to be done; x itself without stats.
    """
    if stats is not None:
        b_u = normalise(b_x.to(tl.float32), stats, b_c, channels)
        if b_residual is not None:
            b_r = b_residual.to(tl.float32)
            if residual_stats is not None:
                b_r = normalise(b_r, residual_stats, b_c, channels)
            b_u += b_r
        if b_there is not None:
            # before the ReLU, which then is one instruction with the conversion
            b_u = tl.where(b_there[:, None], b_u, 0.0)
        if RELU:
            b_u = tl.where(b_u <= 0, 0.0, b_u)  # relu(NaN) is NaN
        b_x = b_u.to(b_x.dtype)
    return b_x


@triton.jit
def without_prologue(b_v, b_exists, DIRECT: tl.constexpr):
    """b_v, of which the columns that don't exist are 0 already.

    Unless DIRECT they are made 0 again: with no arithmetic between load and product the compiler copies
    right into the layout that the product reads, and where that is transposed, value by value or too late.
    """
    if not DIRECT:
        b_v = tl.where(b_exists[None, :], b_v, 0.0).to(b_v.dtype)
    return b_v


def direct(arch: tuple[int, int], itemsize: int) -> bool:
    """Whether the tensor cores transpose what lies in shared memory: wgmma and tcgen05, of two bytes."""
    return arch[0] in (9, 10) and itemsize == 2


def precision() -> str:
    """How float32 is multiplied: by tensor cores if PyTorch's convolutions may be."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
