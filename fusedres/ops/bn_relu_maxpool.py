"""bn_relu_maxpool: normalise, ReLU, and the maximum over 3x3 windows, stride 2, padding 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.rows import SUMS_ROWS
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_activations, check_vectors, laid_out, new_like, new_sums


def pooled(shape: torch.Size) -> tuple[int, int, int, int]:
    """The shape behind a 3x3 pooling of stride 2 and padding 1."""
    n, c, h, w = shape
    return n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1


def bn_relu_maxpool(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    check_activations(x, stats)
    memory = layout(x)
    (x,) = laid_out(memory, x)
    z, index = (new_pooled(x, dtype) for dtype in (x.dtype, torch.uint8))
    kernel("bn_relu_maxpool", x)(x, stats, z, index)
    return z, index


def bn_relu_maxpool_backward_reduce(grad: Tensor, index: Tensor, x: Tensor, stats: Tensor) -> Tensor:
    _check_pooled(grad, index, x, stats)
    grad, index, x = laid_out(layout(x), grad, index, x)
    sums, _ = new_sums(stats, None)
    kernel("bn_relu_maxpool_backward_reduce", x)(grad, index, x, stats, sums)
    return sums


def bn_relu_maxpool_backward_apply(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None
) -> Tensor:
    _check_pooled(grad, index, x, stats)
    check_vectors(x, (SUMS_ROWS, x.shape[1]), sums=sums)
    memory = layout(x)
    grad, index, x = laid_out(memory, grad, index, x)
    dx = torch.empty_like(x, memory_format=memory)
    kernel("bn_relu_maxpool_backward_apply", x)(grad, index, x, stats, sums, dx)
    return dx


def _check_pooled(grad: Tensor, index: Tensor, x: Tensor, stats: Tensor) -> None:
    check_activations(x, stats)
    shape = pooled(x.shape)
    for name, t, dtype in (("grad", grad, x.dtype), ("index", index, torch.uint8)):
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.shape != shape or t.device != x.device:
            raise ValueError(f"{name} must be {list(shape)} on {x.device}, got {list(t.shape)} on {t.device}")


def new_pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(pooled(x.shape), dtype=dtype, device=x.device, memory_format=layout(x))


OPS = {
    # index is the place of the maximum in its window
    "bn_relu_maxpool": Op(
        "(Tensor x, Tensor stats) -> (Tensor z, Tensor index)",
        bn_relu_maxpool,
        lambda x, stats: (new_pooled(x, x.dtype), new_pooled(x, torch.uint8)),
    ),
    "bn_relu_maxpool_backward_reduce": Op(
        "(Tensor grad, Tensor index, Tensor x, Tensor stats) -> Tensor",
        bn_relu_maxpool_backward_reduce,
        lambda grad, index, x, stats: new_sums(stats, None)[0],
    ),
    "bn_relu_maxpool_backward_apply": Op(
        "(Tensor grad, Tensor index, Tensor x, Tensor stats, Tensor? sums) -> Tensor",
        bn_relu_maxpool_backward_apply,
        lambda grad, index, x, stats, sums: new_like(x),
    ),
}
