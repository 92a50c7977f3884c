"""bottleneck_infer: a residual block of a trained net, 1x1, 3x3, 1x1 with biases, the sum and the ReLUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import plan
from fusedres.ops.conv import check_like, check_weight
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out, new_like


def shape_of(x: Tensor, weight: Tensor) -> plan.Conv:
    """What the choice of an implementation depends on; ``weight``: of the 3x3."""
    n, channels, height, width = x.shape
    ieee = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return plan.Conv(n, channels, height, width, weight.shape[0], 3, 1, ieee=ieee, residual=True)


def bottleneck_infer(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
) -> Tensor:
    inner, channels = check_weight(x, weight1, 1)
    if tuple(weight1.shape[2:]) != (1, 1):
        raise ValueError(f"weight1 must be [D, {channels}, 1, 1], got {list(weight1.shape)}")
    check_like(x, torch.Size((inner, inner, 3, 3)), weight2=weight2)
    check_like(x, torch.Size((channels, inner, 1, 1)), weight3=weight3)
    check_vectors(x, (inner,), bias1=bias1, bias2=bias2)
    check_vectors(x, (channels,), bias3=bias3)
    z = new_like(x)
    x, weight1, weight2, weight3 = laid_out(layout(x), x, weight1, weight2, weight3)
    if z.numel():
        run = kernel("bottleneck_infer", x, shape_of(x, weight2))
        run(x, weight1, bias1, weight2, bias2, weight3, bias3, z)
    return z


OPS = {
    # of stride 1, the block's input being its shortcut
    "bottleneck_infer": Op(
        "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3)"
        " -> Tensor",
        bottleneck_infer,
        lambda x, weight1, bias1, weight2, bias2, weight3, bias3: new_like(x),
    ),
}
