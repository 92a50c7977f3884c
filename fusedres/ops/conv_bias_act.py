"""conv_bias_act: a convolution with what follows it in a trained net: bias, residual, ReLU; for inference.

1x1 without padding and 3x3 padded by 1, of stride 1 or 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.conv import check_like, check_weight, out_size, shape_of
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out


def conv_bias_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, stride: int
) -> Tensor:
    filters, _ = check_weight(x, weight, stride)
    check_vectors(x, (filters,), bias=bias)
    z = _output(x, weight, stride)
    check_like(x, z.shape, residual=residual)
    x, weight, residual = laid_out(layout(x), x, weight, residual)
    if z.numel():
        shape = shape_of(x, weight, stride, pending=False, residual=residual is not None)
        run = kernel("conv_bias_act", x, shape)
        run(x, weight, bias, residual, relu, stride, z)
    return z


def _output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], out_size(h, stride), out_size(w, stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


OPS = {
    # residual: of the output's shape, added before the ReLU
    "conv_bias_act": Op(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, int stride) -> Tensor",
        conv_bias_act,
        lambda x, weight, bias, residual, relu, stride: _output(x, weight, stride),
    ),
}
