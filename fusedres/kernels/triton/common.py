"""What the batch-norm kernels share: where a tile lies, and the arithmetic on it."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels import rows

MEAN = tl.constexpr(rows.MEAN)
VAR = tl.constexpr(rows.VAR)
RSTD = tl.constexpr(rows.RSTD)
SCALE = tl.constexpr(rows.SCALE)
SHIFT = tl.constexpr(rows.SHIFT)
DBIAS = tl.constexpr(rows.DBIAS)
DWEIGHT = tl.constexpr(rows.DWEIGHT)
SLOPE = tl.constexpr(rows.SLOPE)
OFFSET = tl.constexpr(rows.OFFSET)
ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def locate(channels, BLOCK_C: tl.constexpr):
    """This program's number among those of its channels (int64), and its channels.

    Neighbouring programs take neighbouring channels of the same rows, so together they read whole
    rows. One grid axis, since the others end at 65535.
    """
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(channels, BLOCK_C)
    b_c = (pid % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // column_blocks).to(tl.int64), b_c


@triton.jit
def tile(first, rows, b_c, channels, BLOCK_M: tl.constexpr):
    """Offset of row ``first`` (int64), offsets from there (int32), and which of them exist."""
    b_m = tl.arange(0, BLOCK_M)
    mask = (b_m < rows - first)[:, None] & (b_c < channels)[None, :]
    return first * channels, b_m[:, None] * channels + b_c[None, :], mask


@triton.jit
def load_row(matrix, row: tl.constexpr, b_c, channels):
    """One row of stats or sums, at the channels ``b_c``."""
    return tl.load(matrix + row * channels + b_c, mask=b_c < channels, other=0.0)


@triton.jit
def affine(b_x, b_scale, b_shift):
    """x * scale + shift. Forward and backward must round alike, so the fma is explicit."""
    return tl.fma(b_x, b_scale[None, :], b_shift[None, :])


@triton.jit
def normalise(b_x, stats, b_c, channels):
    """The same, with scale and shift out of ``stats``."""
    return affine(b_x, load_row(stats, SCALE, b_c, channels), load_row(stats, SHIFT, b_c, channels))


@triton.jit
def saturated(b_u):
    """The nearest int8, the even one in a tie. Beside 1.5 * 2^23 a float32 has no bits behind the point."""
    b_u = tl.minimum(tl.maximum(b_u, -128.0), 127.0)
    return (b_u + ROUND - ROUND).to(tl.int8)


@triton.jit
def relu_mask(b_z, b_g):
    """g, but 0 where z <= 0: a NaN lets it through."""
    return tl.where(b_z <= 0, 0.0, b_g).to(b_g.dtype)


@triton.jit
def add_product(b_sum, b_du, b_x, b_mean, mask):
    """sum + du * (x - mean) where a row exists: past the end du is 0, but the mean may not be finite."""
    return tl.where(mask, tl.fma(b_du, b_x - b_mean[None, :], b_sum), b_sum)


@triton.jit
def store_sums(sums, stats, b_dbias, b_product, rows, b_c, channels):
    """sums = [dbias, dweight, slope, offset] out of sum(du) and sum(du * (x - mean)) over ``rows`` rows."""
    b_rstd = load_row(stats, RSTD, b_c, channels)
    b_per_value = -load_row(stats, SCALE, b_c, channels) / rows
    b_dweight = b_product * b_rstd
    p_sums, mask = sums + b_c, b_c < channels
    tl.store(p_sums + DBIAS * channels, b_dbias, mask=mask)
    tl.store(p_sums + DWEIGHT * channels, b_dweight, mask=mask)
    tl.store(p_sums + SLOPE * channels, b_per_value * b_rstd * b_dweight, mask=mask)
    tl.store(p_sums + OFFSET * channels, b_per_value * b_dbias, mask=mask)


@triton.jit
def input_gradient(b_du, b_x, stats, sums, b_c, channels):
    """scale * du, and with sums + slope * (x - mean) + offset."""
    b_dx = load_row(stats, SCALE, b_c, channels)[None, :] * b_du
    if sums is not None:
        b_slope = load_row(sums, SLOPE, b_c, channels)
        b_offset = load_row(sums, OFFSET, b_c, channels)
        b_centred = b_x - load_row(stats, MEAN, b_c, channels)[None, :]
        b_dx += tl.fma(b_slope[None, :], b_centred, b_offset[None, :])
    return b_dx
