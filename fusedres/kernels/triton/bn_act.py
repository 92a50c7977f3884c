"""bn_act: normalise, add the residual (normalised as well, where it has statistics), apply the ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import locate, normalise, tile
from fusedres.kernels.triton.config import launch


# z = relu(x * scale + shift (+ residual, or residual * its scale + its shift))
# Reads x (and residual), writes z, each once. A tile is a few independent 16-byte accesses for every
# thread, enough in flight to keep memory busy; scale and shift come out of the L2 cache.
@triton.jit(do_not_specialize=["rows", "channel_groups"])
def bn_act_fwd_kernel(
    x,
    stats,
    residual,
    residual_stats,
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
    b_u = normalise(b_x, stats, b_c, channels)
    if residual is not None:
        if residual_stats is not None:
            b_r = normalise(b_r, residual_stats, b_c, channels)
        b_u += b_r
    if RELU:
        b_u = tl.where(b_u <= 0, 0.0, b_u)  # relu(NaN) is NaN
    tl.store(z + base + offsets, b_u.to(z.dtype.element_ty), mask=mask)


def bn_act(
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    run = launch("bn_act", x, residual_stats)
    with torch.cuda.device_of(x):
        bn_act_fwd_kernel[run.grid](
            *(x, stats, residual, residual_stats, out),
            *(run.rows, run.channel_groups),
            RELU=relu,
            **run.keywords,
        )
