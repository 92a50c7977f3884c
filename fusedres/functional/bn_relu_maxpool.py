"""bn_relu_maxpool: batch norm, ReLU and the max pool of the stem."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.functional.autograd import (
    differentiable_once,
    differentiated,
    parameter_gradients,
    serves,
)
from fusedres.functional.batch_norm import BatchNorm, check_batch_norm
from fusedres.functional.bn_act import bn_act_of
from fusedres.functional.processes import Over

_OPS = torch.ops.fusedres


class BNReluMaxPool(torch.autograd.Function):
    """max_pool(relu(batch_norm(x))) behind its statistics; saves x, and a byte for every output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, over: Over
    ) -> Tensor:
        z, index = _OPS.bn_relu_maxpool(x, stats)
        ctx.over = over
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.backend = ops.forced_backend()
        ctx.save_for_backward(x, index, stats)
        return z  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index, stats = saved
        need_x, *need_params = ctx.needs_input_grad[:3]
        sums = dx = None
        if any(need_params) or (ctx.over.training and need_x):
            sums = _OPS.bn_relu_maxpool_backward_reduce(grad, index, x, stats)
        if need_x:
            through = ctx.over.through(sums, x)
            dx = _OPS.bn_relu_maxpool_backward_apply(grad, index, x, stats, through)
        return dx, *parameter_gradients((sums,), need_params, ctx.dtypes), None, None


def bn_relu_maxpool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: Any = None,
) -> Tensor:
    """The stem behind its convolution: ``max_pool(relu(batch_norm(x)))``, 3x3 of stride 2, padding 1.

    He et al. 2015, table 1. Where no kernel has it in one pass, :func:`bn_act` and a max pool run.

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32, as in :func:`bn_act`; the others likewise.
        weight: [C] or None.
        bias: [C] or None.
        running_mean: [C] or None.
        running_var: [C] or None.
        training: normalise with the batch's statistics, else with the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        group: as in :func:`bn_act`.

    Returns:
        [N, C, ceil(H / 2), ceil(W / 2)], dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bn_act`.
    """
    norm = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps, group)
    check_batch_norm(x, norm)
    return bn_relu_maxpool_of(x, norm)


def bn_relu_maxpool_of(x: Tensor, norm: BatchNorm, stats: Tensor | None = None) -> Tensor:
    """The same; ``stats`` where what normalises ``x`` is known already, and the running ones are updated."""
    if not serves("bn_relu_maxpool", x, norm):
        return F.max_pool2d(bn_act_of(x, norm, stats), 3, 2, 1)
    x = x.contiguous(memory_format=ops.layout(x))
    stats = norm.stats(x) if stats is None else stats
    if not differentiated(x, norm.weight, norm.bias):
        return _OPS.bn_relu_maxpool(x, stats)[0]  # type: ignore[no-any-return]
    return BNReluMaxPool.apply(x, norm.weight, norm.bias, stats, norm.over)  # type: ignore[no-any-return]
