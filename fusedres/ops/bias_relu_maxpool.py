"""bias_relu_maxpool: a bias, ReLU, and the maximum over 3x3 windows, stride 2, padding 1; for inference."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops.bn_relu_maxpool import new_pooled
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out


def bias_relu_maxpool(x: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}")
    check_vectors(x, (x.shape[1],), bias=bias)
    (x,) = laid_out(layout(x), x)
    z = new_pooled(x, x.dtype)
    if z.numel():
        kernel("bias_relu_maxpool", x)(x, bias, z)
    return z


OPS = {
    "bias_relu_maxpool": Op(
        "(Tensor x, Tensor? bias) -> Tensor", bias_relu_maxpool, lambda x, bias: new_pooled(x, x.dtype)
    ),
}
