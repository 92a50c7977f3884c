"""From the children of a block to ``functional``: what runs fused, and why what doesn't.

A batch norm, the residual add behind it and the activation run as one call wherever that changes
nothing, else child by child.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

from fusedres import functional
from fusedres.nn.frozen import FrozenBatchNorm2d

_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = (*_PLAIN, type(None))
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is a tensor without a subclass's own ways."""
    return type(tensor) in _PLAIN


def is_frozen(norm: nn.Module) -> bool:
    return type(norm) is FrozenBatchNorm2d or _is_torchvisions(norm)


def _is_torchvisions(norm: nn.Module) -> bool:
    # by name: importing torchvision takes a second, and who has such a module has imported it
    kind = type(norm)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def convolved_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what a convolution makes of ``x``: autocast's, if that is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def unfused_dtype_reason(norm: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a fixed batch norm can't run fused on an input of ``dtype``; None if it can."""
    if not is_frozen(norm):
        return None
    own: torch.dtype = norm._buffers["weight"].dtype  # type: ignore[union-attr]
    if own == dtype:
        return None
    if _is_torchvisions(norm):
        return f"torchvision's FrozenBatchNorm2d promotes {dtype} with its {own} buffers"
    if own == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        return None
    return f"FrozenBatchNorm2d has {own} buffers for an input of {dtype}"


def altered(child: nn.Module) -> str | None:
    """Why calling ``child`` does more than its class's forward; None if it doesn't."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "has a hook"
    if "forward" in child.__dict__:
        return "has a forward of its own"
    if child._compiled_call_impl is not None:
        return "was compiled by itself"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "is under a global module hook"
    return None


def traced(x: Tensor) -> str | None:
    """Why children have to be called one by one for ``x``, whatever they are; None if they needn't."""
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit is tracing"
    if torch._C._are_functorch_transforms_active():
        return "torch.func is transforming the call"
    return None


def _tensors(norm: nn.Module) -> tuple[Any, ...]:
    """weight, bias, running mean and variance, past nn.Module's slow way to an attribute.

    Something that is no tensor stands for one that isn't where its class puts it.
    """
    parameters: dict[str, Any] = norm._parameters if type(norm) in _BATCH_NORMS else norm._buffers
    buffers = norm._buffers
    return (
        parameters.get("weight", norm),
        parameters.get("bias", norm),
        buffers.get("running_mean", norm),
        buffers.get("running_var", norm),
    )


def unfused_reason(
    norm: nn.Module, act: nn.Module | None, x: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """Why ``norm``, the residual add and ``act`` can't run as one fused ``bn_act``; None if they can.

    Args:
        norm: the normalisation, fused if it is exactly an nn.BatchNorm2d, an nn.SyncBatchNorm or a
            FrozenBatchNorm2d, ours or torchvision's.
        act: the activation behind it, fused if it is exactly an nn.ReLU or nn.Identity; None for none.
        x: [N, C, H, W], what ``norm`` is about to be called on; None to look at the modules alone.
        residual: [N, C, H, W], what is added in between.
    """
    if type(norm) not in _BATCH_NORMS and not is_frozen(norm):
        return f"the norm is a {type(norm).__name__}, not an nn.BatchNorm2d or FrozenBatchNorm2d"
    if type(norm) is nn.SyncBatchNorm and torch.compiler.is_compiling():
        return "the norm is a SyncBatchNorm, which torch.compile gets as it is"
    why = altered(norm)
    if why is not None:
        return f"the norm {why}"
    if act is not None:
        if type(act) is not nn.ReLU and type(act) is not nn.Identity:
            return f"the activation is a {type(act).__name__}, not an nn.ReLU or nn.Identity"
        why = altered(act)
        if why is not None:
            return f"the activation {why}"
    if x is not None:
        # before a parameter is read, which fx would record
        why = traced(x)
        if why is not None:
            return why
    weight, bias, mean, var = _tensors(norm)
    if not (
        type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(var) in _PLAIN_OR_NONE
    ):
        return "the norm's parameters or buffers aren't plain tensors"
    if x is None:
        return None
    if x.dim() != 4:
        return f"the input is {x.dim()}D"
    why = unfused_dtype_reason(norm, x.dtype)
    if why is not None:
        return why
    if residual is not None and not (
        type(residual) in _PLAIN
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
    ):
        return "the residual differs from the input in kind, dtype, shape or device"
    return None


def is_recomputed() -> bool:
    """Whether this forward repeats an earlier one, inside the backward of activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _copy(statistics: Tensor) -> Tensor:
    # selective checkpointing lets a repeated forward call no op that the first one didn't
    with _disable_current_modes():
        return statistics.clone()


@contextlib.contextmanager
def copied_statistics(block: Any) -> Iterator[None]:
    """Inside, the batch norms of ``block`` update copies of their running statistics."""
    buffers = [module._buffers for module in block.modules() if type(module) in _BATCH_NORMS]
    before = [dict(of_norm) for of_norm in buffers]
    for of_norm in buffers:
        of_norm |= {name: None if value is None else _copy(value) for name, value in of_norm.items()}
    try:
        yield
    finally:
        for of_norm, own in zip(buffers, before, strict=True):
            of_norm.update(own)


def group_of(norm: nn.Module) -> Any:
    """The processes whose batches an nn.SyncBatchNorm takes together; None where there is but one."""
    if (
        type(norm) is not nn.SyncBatchNorm
        or not norm.training
        or not distributed.is_available()
        or not distributed.is_initialized()
    ):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def batch_norm_of(norm: Any) -> functional.BatchNorm:
    """The arguments that ``norm``'s own forward would give F.batch_norm.

    A forward that activation checkpointing repeats gets copies of the running statistics: they have this
    batch already.
    """
    weight, bias, mean, var = _tensors(norm)
    training, momentum, group = False, None, None
    if type(norm) in _BATCH_NORMS:
        training, momentum = norm.training, norm.momentum
        if training and not norm.track_running_stats:
            mean = var = None
        elif training:
            tracked = norm.num_batches_tracked
            if is_recomputed() and mean is not None and var is not None:
                mean, var = _copy(mean), _copy(var)
            elif tracked is not None:
                tracked.add_(1)
            if momentum is None and tracked is not None:
                momentum = 1.0 / float(tracked)
        training, group = training or (mean is None and var is None), group_of(norm)
    return functional.BatchNorm(
        weight, bias, mean, var, training, 0.0 if momentum is None else momentum, norm.eps, group
    )


def batch_norm_act(
    norm: nn.Module,
    act: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
) -> Tensor:
    """``act(norm(x) + residual_norm(residual))``: fused where :func:`unfused_reason` finds nothing against.

    Otherwise the children are called one after the other, as torchvision's blocks do it.

    Args:
        norm: a batch norm; anything else is called.
        act: the activation; None for none.
        x: [N, C, H, W], bf16 | fp16 | fp32, channels_last or NCHW.
        residual: [N, C, H, W], the shortcut's output, or None.
        residual_norm: the norm that the residual goes through first; None for none.

    Returns:
        [N, C, H, W], dtype of x.
    """
    if residual is not None and residual_norm is not None:
        together = (
            unfused_reason(residual_norm, None, residual) is None
            and unfused_reason(norm, act, x, residual) is None
        )
        if not together:
            residual, residual_norm = batch_norm_act(residual_norm, None, residual), None
    if unfused_reason(norm, act, x, residual) is None:
        # in the order of the plain calls
        branch = None if residual_norm is None else batch_norm_of(residual_norm)
        own = batch_norm_of(norm)
        return functional.bn_act(
            x,
            *own[:4],
            residual=residual,
            residual_norm=branch,
            relu=type(act) is nn.ReLU,
            training=own.training,
            momentum=own.momentum,
            eps=own.eps,
            group=own.group,
        )
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return out if act is None else act(out)


def global_avg_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(x)``, by :func:`functional.global_avg_pool` if it is exactly an nn.AdaptiveAvgPool2d to 1x1."""
    if (
        type(pool) is nn.AdaptiveAvgPool2d
        and pool.output_size in (1, (1, 1))
        and altered(pool) is None
        and traced(x) is None
        and x.dim() == 4
    ):
        return functional.global_avg_pool(x)
    return pool(x)  # type: ignore[no-any-return]
