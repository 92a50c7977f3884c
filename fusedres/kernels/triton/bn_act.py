"""bn_act: normalise, add the residual, apply the ReLU, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import SCALE, SHIFT, affine, load_row, locate, tile
from fusedres.kernels.triton.config import launch


# z = relu(x * scale + shift (+ residual))
# Reads x (and residual), writes z, each once. A tile is a few independent 16-byte accesses for every
# thread, enough in flight to keep memory busy; scale and shift come out of the L2 cache.
@triton.jit(do_not_specialize=["rows", "channel_groups"])
def bn_act_fwd_kernel(
    x,
    stats,
    residual,
    z,
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

    b_x = tl.load(x + base + offsets, mask=mask).to(tl.float32)
    if residual is not None:
        b_r = tl.load(residual + base + offsets, mask=mask).to(tl.float32)
    b_u = affine(b_x, load_row(stats, SCALE, b_c, channels), load_row(stats, SHIFT, b_c, channels))
    if residual is not None:
        b_u += b_r
    if RELU:
        b_u = tl.where(b_u <= 0, 0.0, b_u)  # relu(NaN) is NaN
    tl.store(z + base + offsets, b_u.to(z.dtype.element_ty), mask=mask)


def bn_act(x: Tensor, stats: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
    channels = x.shape[1]
    rows = x.numel() // channels
    config, vec, _, _, grid = launch("bn_act", rows, channels, x.element_size(), x.device)
    with torch.cuda.device_of(x):
        bn_act_fwd_kernel[grid](
            x,
            stats,
            residual,
            out,
            rows,
            channels // vec,
            RELU=relu,
            VEC=vec,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
