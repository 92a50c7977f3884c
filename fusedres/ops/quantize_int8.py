"""quantize_int8: an activation as levels of 8 bits, for the convolutions of a quantised net."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, laid_out


def quantize_int8(x: Tensor, step: float, zero: int) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not step > 0:
        raise ValueError(f"step must be greater than 0, got {step}")
    (x,) = laid_out(layout(x), x)
    z = _output(x)
    if z.numel():
        kernel("quantize_int8", x)(x, step, zero, z)
    return z


def _output(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=layout(x))


OPS = {
    # round(x / step + zero), to even in a tie, saturated
    "quantize_int8": Op(
        "(Tensor x, float step, int zero) -> Tensor", quantize_int8, lambda x, step, zero: _output(x)
    ),
}
