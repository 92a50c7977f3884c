"""quantize_int8: an activation as levels of 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.triton.common import saturated

# a thread has 32 values: enough accesses of 16 bytes under way, also of a two-byte dtype
BLOCK, WARPS = 4096, 4


# z = round(x / step + zero), saturated. Reads x and writes z, each once, in the order of memory.
@triton.jit
def quantize_int8_kernel(x, scale, zero, z, values, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    b_i = tl.arange(0, BLOCK)
    mask = b_i < values - base
    b_u = tl.fma(tl.load(x + base + b_i, mask=mask, other=0.0).to(tl.float32), scale, zero)
    tl.store(z + base + b_i, saturated(b_u), mask=mask)


def quantize_int8(x: Tensor, step: float, zero: int, z: Tensor) -> None:
    values = x.numel()
    with torch.cuda.device_of(x):
        quantize_int8_kernel[(triton.cdiv(values, BLOCK),)](
            *(x, 1 / step, float(zero), z, values), BLOCK=BLOCK, num_warps=WARPS
        )
