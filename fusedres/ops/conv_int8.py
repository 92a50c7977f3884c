"""conv_int8: a convolution of 8-bit activations and weights with what follows it in a trained net.

    z = max(scale * (conv(x) + offset) + bias + residual_step * residual, floor)

A level q stands for (q - zero) * step (Jacob et al. 2018, equation 1), of weights with a step for each filter
and no zero. So this is a convolution with bias, residual add, ReLU and the rounding to levels of z, with

    offset = -zero_x * sum(weight)                      scale = step_x * step_weight / step_z
    bias = (b - zero_r * step_r) / step_z + zero_z      residual_step = step_r / step_z
    floor = zero_z with a ReLU, else -inf

where step_z is 1 and zero_z is 0 if floating point comes out. What stands around the image is zero_x.
conv(x) + offset is exact, in int32; rounding is to even in a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.conv import check_like, check_weight, out_size, shape_of
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out

_OUTPUTS = (torch.int8, torch.float32, torch.bfloat16, torch.float16)
# products that an int32 holds the sum of, whatever they and the zero are
_TERMS = 2**31 // (255 * 128)


def conv_int8(
    x: Tensor,
    border: Tensor,
    weight: Tensor,
    offset: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_step: float,
    floor: float,
    stride: int,
    dtype: torch.dtype,
) -> Tensor:
    if x.dtype != torch.int8:
        raise TypeError(f"x must be torch.int8, got {x.dtype}")
    filters, channels = check_weight(x, weight, stride)
    if weight[0].numel() > _TERMS:
        raise ValueError(f"weight must have at most {_TERMS:,} values a filter, got {weight[0].numel():,}")
    if dtype not in _OUTPUTS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _OUTPUTS))}, got {dtype}")
    check_vectors(x, (channels,), torch.int8, border=border)
    check_vectors(x, (filters,), torch.int32, offset=offset)
    check_vectors(x, (filters,), scale=scale, bias=bias)
    z = _output(x, weight, stride, dtype)
    check_like(x, z.shape, residual=residual)
    x, weight, residual = laid_out(layout(x), x, weight, residual)
    if z.numel():
        shape = shape_of(x, weight, stride, pending=False, residual=residual is not None)
        run = kernel("conv_int8", x, shape)
        run(x, border, weight, offset, scale, bias, residual, residual_step, floor, stride, z)
    return z


def _output(x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], out_size(h, stride), out_size(w, stride))
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout(x))


def _fake(x, border, weight, offset, scale, bias, residual, residual_step, floor, stride, dtype):  # type: ignore[no-untyped-def]
    return _output(x, weight, stride, dtype)


OPS = {
    # border: what stands around the image in each channel; x, border, weight and residual are int8, offset is
    # int32, scale and bias are float32; dtype: of the result, int8 or floating point
    "conv_int8": Op(
        "(Tensor x, Tensor border, Tensor weight, Tensor offset, Tensor scale, Tensor bias, Tensor? residual,"
        " float residual_step, float floor, int stride, ScalarType dtype) -> Tensor",
        conv_int8,
        _fake,
    ),
}
