"""global_avg_pool and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, laid_out


def global_avg_pool(x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}")
    (x,) = laid_out(layout(x), x)
    out = x.new_empty((*x.shape[:2], 1, 1))
    kernel("global_avg_pool", x)(x, out)
    return out


def global_avg_pool_backward(grad: Tensor, height: int, width: int) -> Tensor:
    if grad.dim() != 4 or grad.shape[2:] != (1, 1):
        raise ValueError(f"grad must be [N, C, 1, 1], got {list(grad.shape)}")
    grad = grad.contiguous()
    dx = _new_image(grad, height, width)
    kernel("global_avg_pool_backward", grad)(grad, dx)
    return dx


def _new_image(grad: Tensor, height: int, width: int) -> Tensor:
    shape = (*grad.shape[:2], height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


OPS = {
    "global_avg_pool": Op(
        "(Tensor x) -> Tensor", global_avg_pool, lambda x: x.new_empty((*x.shape[:2], 1, 1))
    ),
    "global_avg_pool_backward": Op(
        "(Tensor grad, SymInt height, SymInt width) -> Tensor", global_avg_pool_backward, _new_image
    ),
}
