"""Stateless public functions: the contract, its validation, and the autograd Functions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import _ownership, ops

__all__ = ["bn_act"]

_OPS = torch.ops.fusedres


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    relu: bool,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the per-channel vectors that it came from."""
    dtype = ops.stats_dtype(x)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if training:
        stats = _OPS.bn_stats(x, weight, bias, eps)
    else:
        stats = _OPS.bn_running_stats(running_mean, running_var, weight, bias, eps)
    return _OPS.bn_act(x, stats, residual, relu), stats


class BNAct(torch.autograd.Function):
    """relu(batch_norm(x) + residual) in two passes forward and two backward.

    Saved for backward: x, the per-channel vectors and, only where a residual went through the ReLU,
    the output; without one the ReLU's mask is computed again from x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        relu: bool,
        training: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        z, stats = _forward(x, residual, weight, bias, running_mean, running_var, relu, training, eps)
        ctx.relu, ctx.training = relu, training
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.through_relu = residual is not None and relu
        ctx.backend = ops.forced_backend()
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z if ctx.through_relu else None, stats)
        return z, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        holders = _ownership.references(grad)
        if torch.is_grad_enabled():
            # create_graph=True: what comes out has to raise when it is differentiated; without this a
            # penalty on a gradient that doesn't depend on later layers would be ignored in silence
            grad = grad.detach().requires_grad_()
        owned = _ownership.owned(grad, holders)
        # the implementation forced on the forward serves the backward too, wherever that is called
        with ops.backend(ctx.backend) if ctx.backend != ops.forced_backend() else nullcontext():
            return BNAct._backward(ctx, grad, owned)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor, owned: bool) -> tuple[Tensor | None, ...]:
        x, z, stats = ctx.saved_tensors
        layout = ops.layout(x)
        if not grad.is_contiguous(memory_format=layout):
            grad, owned = grad.contiguous(memory_format=layout), True
        need_x, need_residual, *need_params = ctx.needs_input_grad[:4]
        # from here on grad may be du, the gradient behind the ReLU: then relu is False
        relu, sums = ctx.relu, None
        if any(need_params) or (ctx.training and need_x):
            if not ctx.through_relu:
                _, sums = _OPS.bn_act_backward_reduce(grad, x, None, stats, relu)
            elif owned:
                sums = _OPS.bn_act_backward_reduce_(grad, x, z, stats)
            else:
                grad, sums = _OPS.bn_act_backward_reduce(grad, x, z, stats, True)
                owned = True
        elif ctx.through_relu:
            grad = torch.ops.aten.threshold_backward(grad, z, 0)
            owned = True
        relu = relu and not ctx.through_relu

        dresidual = grad if need_residual else None
        if need_residual and relu is False:
            owned = False
        dx = None
        if need_x:
            through = sums if ctx.training else None
            if owned:
                _OPS.bn_act_backward_apply_(grad, x, stats, through, relu)
                dx = grad
            else:
                dx = _OPS.bn_act_backward_apply(grad, x, stats, through, relu)
        dweight, dbias = (
            sums[row].to(dtype) if need and sums is not None else None
            for row, need, dtype in zip((1, 0), need_params, ctx.dtypes, strict=True)
        )
        return dx, dresidual, dweight, dbias, None, None, None, None, None


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work, which a pointer kernel can't follow."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm, residual add and ReLU: ``relu(batch_norm(x) + residual)``.

    The shortcut of He et al. 2015, section 3.2, equation 1, behind the batch norm of section 3.4.
    The semantics are :func:`torch.nn.functional.batch_norm`'s, running statistics included.

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32 (fp64 runs on PyTorch's own operators). channels_last is
            the native layout; a CPU takes NCHW as it is, elsewhere it is converted and the result is
            channels_last.
        weight: [C], gamma, or None for 1.
        bias: [C], beta, or None for 0.
        running_mean: [C], updated in place when training; None to keep none.
        running_var: [C], likewise; takes the unbiased variance.
        residual: [N, C, H, W], the shortcut, dtype of x; or None.
        relu: apply the ReLU.
        training: normalise with the batch's statistics, else with the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.

    PyTorch's own operators run under a torch.func transform or forward-mode AD, which they can follow,
    and on a CPU for activations so small that a kernel wouldn't pay (unless a backend is forced).

    Returns:
        [N, C, H, W], dtype of x.

    Raises:
        TypeError: a dtype outside the contract.
        ValueError: a shape or device that doesn't fit, one value per channel in training, or
            ``training=False`` without running statistics.
        RuntimeError: a forced backend (:func:`fusedres.backend`) can't serve the call.
    """
    _check(x, weight, bias, running_mean, running_var, residual, training)
    least = ops.served_from("bn_act", x.device, x.dtype, ops.forced_backend())
    values = x.numel()
    kept = running_mean is None or running_mean.dtype == ops.stats_dtype(x)
    transformed = _transformed()
    if least is None or values < max(least, 1) or not kept or transformed:
        out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        if residual is not None:
            # in place, as torchvision's blocks; vmap could not if only the residual is batched
            out = out + residual if transformed else out.add_(residual)
        return F.relu(out, inplace=not transformed) if relu else out
    # once here rather than in every op, forward and backward
    x = x.contiguous(memory_format=ops.layout(x))
    arguments = (x, residual, weight, bias, running_mean, running_var, relu, training, eps)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, residual, weight, bias)
    )
    z, stats = BNAct.apply(*arguments) if differentiated else _forward(*arguments)
    if training and running_mean is not None:
        with torch.no_grad():
            _OPS.bn_update_running_(running_mean, running_var, stats, values // x.shape[1], momentum)
    return z


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be 4D, [N, C, H, W], got {x.dim()}D {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    channels = x.shape[1]
    for name, v in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(
                f"{name} must have one value per channel of x, [{channels}], got {list(v.shape)}"
            )
        if v.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {v.device}")
        if v.dtype != x.dtype and v.dtype != torch.float32:
            raise TypeError(f"{name} must be torch.float32 or the dtype of x, {x.dtype}, got {v.dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}"
            )
        if residual.device != x.device:
            raise ValueError(f"residual must be on the device of x, {x.device}, got {residual.device}")
    if training:
        if x.numel() == channels:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
    elif running_mean is None:
        raise ValueError("running_mean and running_var are needed when training=False")
