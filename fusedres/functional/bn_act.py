"""bn_act: batch norm, residual add and ReLU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import _ownership, ops
from fusedres.functional.autograd import (
    differentiable_once,
    differentiated,
    parameter_gradients,
    serves,
    transformed,
)
from fusedres.functional.batch_norm import BatchNorm, check_batch_norm
from fusedres.functional.processes import Over

_OPS = torch.ops.fusedres


class Reduced(NamedTuple):
    """What the first pass of a backward leaves: the gradient and, if asked, its sums.

    With ``relu`` the ReLU's mask is still to be applied.
    """

    grad: Tensor
    owned: bool
    relu: bool
    sums: Tensor | None
    residual_sums: Tensor | None


def reduce(
    grad: Tensor,
    owned: bool,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    sums: bool,
) -> Reduced:
    """The first pass of the backward of ``bn_act``.

    Args:
        grad: [N, C, H, W], of the output.
        owned: whether ``grad`` may be written over.
        x: [N, C, H, W], the batch norm's input.
        z: [N, C, H, W], the output, where a residual went through the ReLU; else the mask is computed from x.
        stats: [5, C].
        residual: [N, C, H, W], a residual with a batch norm of its own whose sums are wanted, too.
        residual_stats: [5, C], its vectors.
        relu: there was a ReLU.
        sums: whether any are wanted.
    """
    of_x: Tensor | None = None
    of_residual: Tensor | None = None
    if z is None or not relu:
        if sums:
            _, of_x, of_residual = _OPS.bn_act_backward_reduce(
                grad, x, None, stats, residual, residual_stats, relu
            )
    else:
        relu = False
        if not sums:
            grad, owned = torch.ops.aten.threshold_backward(grad, z, 0), True
        elif owned:
            of_x, of_residual = _OPS.bn_act_backward_reduce_(grad, x, z, stats, residual, residual_stats)
        else:
            grad, of_x, of_residual = _OPS.bn_act_backward_reduce(
                grad, x, z, stats, residual, residual_stats, True
            )
            owned = True
    return Reduced(grad, owned, relu, of_x, of_residual)


class BNAct(torch.autograd.Function):
    """relu(batch_norm(x) + residual) behind its statistics: a pass forward and two backward.

    The residual may go through a batch norm of its own first. Saved for backward: x, the per-channel
    vectors, a residual that is normalised and, only where a residual went through the ReLU, the output;
    without one the ReLU's mask is computed again from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        stats: Tensor,
        residual_stats: Tensor | None,
        relu: bool,
        over: tuple[Over, Over],
    ) -> Tensor:
        z: Tensor = _OPS.bn_act(x, stats, residual, residual_stats, relu)
        ctx.relu, ctx.over = relu, over
        parameters = (weight, bias, residual_weight, residual_bias)
        ctx.dtypes = tuple(None if p is None else p.dtype for p in parameters)
        ctx.through_relu = residual is not None and relu
        ctx.backend = ops.forced_backend()
        branch = None if residual_stats is None else residual
        ctx.save_for_backward(x, z if ctx.through_relu else None, stats, branch, residual_stats)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        holders = _ownership.references(grad)
        return BNAct._backward(ctx, grad, _ownership.owned(grad, holders))  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def _backward(ctx: Any, saved: Any, grad: Tensor, owned: bool) -> tuple[Tensor | None, ...]:
        x, z, stats, branch, branch_stats = saved
        layout = ops.layout(x)
        if not grad.is_contiguous(memory_format=layout):
            grad, owned = grad.contiguous(memory_format=layout), True
        need_x, need_residual, *need_params = ctx.needs_input_grad[:6]
        own, others = ctx.over
        of_x = any(need_params[:2]) or (own.training and need_x)
        of_branch = branch is not None and (any(need_params[2:]) or (others.training and need_residual))
        grad, owned, relu, sums, branch_sums = reduce(
            grad,
            owned,
            x,
            z,
            stats,
            branch if of_branch else None,
            branch_stats if of_branch else None,
            ctx.relu,
            of_x or of_branch,
        )

        through = own.through(sums, x)
        branch_through = None if branch is None else others.through(branch_sums, branch)
        dx = dresidual = None
        if branch is None:
            dresidual = grad if need_residual else None
            if need_x:
                dx, _ = _apply(grad, x, stats, through, owned and dresidual is None, relu)
        elif need_x:
            side = (branch, branch_stats, branch_through) if need_residual else (None, None, None)
            dx, dresidual = _apply(grad, x, stats, through, owned, relu, *side)
        elif need_residual:
            dresidual, _ = _apply(grad, branch, branch_stats, branch_through, owned, relu)
        if not need_residual:
            dresidual = None
        dparams = parameter_gradients((sums, branch_sums), need_params, ctx.dtypes)
        return dx, dresidual, *dparams, None, None, None, None


def _apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    owned: bool,
    relu: bool,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    residual_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of a normalised residual; x's in the place of ``grad`` if that is owned."""
    arguments = (x, stats, sums, residual, residual_stats, residual_sums, relu)
    if owned:
        return grad, _OPS.bn_act_backward_apply_(grad, *arguments)
    return _OPS.bn_act_backward_apply(grad, *arguments)  # type: ignore[no-any-return]


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    relu: bool = True,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: Any = None,
) -> Tensor:
    """Batch norm, residual add and ReLU: ``relu(batch_norm(x) + residual)``.

    The shortcut of He et al. 2015, section 3.2, equation 1 and, with ``residual_norm``, equation 2,
    behind the batch norm of section 3.4. The semantics are :func:`torch.nn.functional.batch_norm`'s,
    running statistics included.

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32 (fp64 runs on PyTorch's own operators). channels_last is
            the native layout; a CPU takes NCHW as it is, elsewhere it is converted and the result is
            channels_last.
        weight: [C], gamma, or None for 1.
        bias: [C], beta, or None for 0.
        running_mean: [C], updated in place when training; None to keep none.
        running_var: [C], likewise; takes the unbiased variance.
        residual: [N, C, H, W], the shortcut, dtype of x; or None.
        residual_norm: a batch norm that the residual goes through first, a projection shortcut's; or None.
        relu: apply the ReLU.
        training: normalise with the batch's statistics, else with the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        group: a torch.distributed.ProcessGroup whose batches are one when training, as for
            :class:`torch.nn.SyncBatchNorm`; None for this process's alone.

    PyTorch's own operators run under a torch.func transform or forward-mode AD, which they can follow,
    and on a CPU for activations so small that a kernel wouldn't pay (unless a backend is forced).

    Returns:
        [N, C, H, W], dtype of x.

    Raises:
        TypeError: a dtype outside the contract.
        ValueError: a shape or device that doesn't fit, one value per channel in training, a
            ``residual_norm`` without a residual, or ``training=False`` without running statistics.
        RuntimeError: a forced backend (:func:`fusedres.backend`) can't serve the call.
    """
    norm = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps, group)
    check_batch_norm(x, norm)
    if residual is not None:
        _check_residual(x, residual, residual_norm)
    elif residual_norm is not None:
        raise ValueError("residual_norm needs a residual")
    return bn_act_of(x, norm, None, residual, residual_norm, relu)


def bn_act_of(
    x: Tensor,
    norm: BatchNorm,
    stats: Tensor | None,
    residual: Tensor | None = None,
    residual_norm: BatchNorm | None = None,
    relu: bool = True,
) -> Tensor:
    """The same; ``stats`` where what normalises ``x`` is known already, and the running ones are updated."""
    if stats is None and not serves("bn_act", x, norm, residual_norm):
        return _plain_bn_act(x, norm, residual, residual_norm, relu)
    # once here rather than in every op, forward and backward
    layout = ops.layout(x)
    x = x.contiguous(memory_format=layout)
    stats, residual_stats = norm.stats(x) if stats is None else stats, None
    if residual_norm is None:
        residual_weight = residual_bias = None
    elif residual is not None:
        residual = residual.contiguous(memory_format=layout)
        residual_stats = residual_norm.stats(residual)
        residual_weight, residual_bias = residual_norm[:2]
    weight, bias = norm[:2]
    if not differentiated(x, residual, weight, bias, residual_weight, residual_bias):
        return _OPS.bn_act(x, stats, residual, residual_stats, relu)  # type: ignore[no-any-return]
    over = (norm.over, Over(False) if residual_norm is None else residual_norm.over)
    return BNAct.apply(  # type: ignore[no-any-return]
        x, residual, weight, bias, residual_weight, residual_bias, stats, residual_stats, relu, over
    )


def _plain_bn_act(
    x: Tensor, norm: BatchNorm, residual: Tensor | None, residual_norm: BatchNorm | None, relu: bool
) -> Tensor:
    followed = transformed()
    out = norm.plain(x)
    if residual is not None:
        if residual_norm is not None:
            residual = residual_norm.plain(residual)
        # in place, as torchvision's blocks; vmap could not if only the residual is batched
        out = out + residual if followed else out.add_(residual)
    return F.relu(out, inplace=not followed) if relu else out


def _check_residual(x: Tensor, residual: Tensor, norm: BatchNorm | None) -> None:
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual must be on the device of x, {x.device}, got {residual.device}")
    if norm is not None:
        check_batch_norm(residual, norm, "residual_norm.")
