"""From the children of a block to one autograd Function: which blocks are fused, and why others aren't."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import functional, ops
from fusedres.nn.casts import weight_of
from fusedres.nn.fuse import (
    altered,
    batch_norm_of,
    convolved_dtype,
    is_plain,
    traced,
    unfused_dtype_reason,
    unfused_reason,
)
from fusedres.nn.shortcut import PadShortcut, is_projection, pooled

# a convolution and the norm behind it
Pairs = Sequence[tuple[nn.Module, nn.Module]]


def _projection(downsample: nn.Module | None) -> tuple[nn.Module, nn.Module] | None:
    """The convolution and the norm of a projection shortcut."""
    if is_projection(downsample):
        return downsample[-2], downsample[-1]
    return None


def _unfused_conv_reason(conv: Any) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"a convolution is a {type(conv).__name__}, not an nn.Conv2d"
    why = altered(conv)
    if why is not None:
        return f"a convolution {why}"
    if not is_plain(conv._parameters.get("weight")):
        return "a convolution's weight isn't a plain tensor"
    side, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    if (
        conv._parameters["bias"] is not None
        or conv.padding_mode != "zeros"
        or side % 2 == 0
        or conv.kernel_size != (side, side)
        or conv.stride != (stride, stride)
        or conv.dilation != (dilation, dilation)
        or conv.padding != (dilation * (side // 2),) * 2
    ):
        return "a convolution has a bias, or isn't square and padded with zeros to keep the size"
    return None


def unfused_chain_reason(pairs: Pairs, act: nn.Module, downsample: nn.Module | None = None) -> str | None:
    """Why a block can't run as one Function, whatever its input; None if it can.

    Args:
        pairs: its convolutions, each with the norm behind it.
        act: the activation behind each norm.
        downsample: the module of its shortcut; None without, or for an identity.
    """
    projection = _projection(downsample)
    if projection is not None:
        pairs = (*pairs, projection)
    elif downsample is not None and type(downsample) is not PadShortcut:
        return f"the shortcut is not a convolution and a norm: {type(downsample).__name__}"
    if downsample is not None:
        why = altered(downsample)
        if why is not None:
            return f"the shortcut {why}"
    for conv, norm in pairs:
        why = _unfused_conv_reason(conv) or unfused_reason(norm, act)
        if why is not None:
            return why
    return None


def _unfused_input_reason(pairs: Pairs, x: Tensor, projected: bool) -> str | None:
    if x.dim() != 4:
        return f"the input is {x.dim()}D"
    dtype = convolved_dtype(x)
    if dtype != x.dtype and not projected:
        return f"the shortcut adds {x.dtype} to autocast's {dtype}"
    for _, norm in pairs:
        why = unfused_dtype_reason(norm, dtype)
        if why is not None:
            return why
    return None


# a lookup by itself takes longer than the rest of the question
@functools.lru_cache
def _least_on_a_cpu(dtype: torch.dtype) -> int | None:
    return ops.served_from("bn_act", torch.device("cpu"), dtype, "auto")


def is_small(x: Tensor, growth: float) -> bool:
    """Whether activations are so few that PyTorch's own operators are as fast: on a CPU.

    The children of a block or a stem are then called as they are, without a look at whether they could be
    fused.

    Args:
        x: [N, C, H, W], the input.
        growth: values of the largest activation behind a norm, by those of ``x``.
    """
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False
    if ops.forced_backend() != "auto" or torch._C._get_tracing_state() is not None:
        return False
    least = _least_on_a_cpu(convolved_dtype(x) if torch._C._is_any_autocast_enabled() else x.dtype)
    return least is None or x.numel() * growth < least


def growth_by(layer: nn.Module | None) -> float:
    """How many values come out of a convolution, or of a shortcut with one, for each that goes in."""
    for child in () if layer is None else (layer, *layer._modules.values()):
        if type(child) is nn.Conv2d:
            return child.out_channels / (child.in_channels * child.stride[0] ** 2)
    return 1.0


def fused_chain(
    pairs: Pairs,
    act: nn.Module,
    x: Tensor,
    downsample: nn.Module | None = None,
    *,
    shortcut: bool = True,
) -> Tensor | None:
    """A block as one Function; None where its children have to be called one by one.

    Args:
        pairs: two or three convolutions, each with the norm behind it.
        act: the activation behind each norm, and behind the sum.
        x: [N, C, H, W], bf16 | fp16 | fp32, channels_last or NCHW.
        downsample: the module of the shortcut; None for an identity.
        shortcut: whether there is one.
    """
    # before a parameter is read, which fx would record
    if torch.compiler.is_compiling() or traced(x) is not None:
        return None
    if unfused_chain_reason(pairs, act, downsample) is not None:
        return None
    projection = _projection(downsample)
    every = pairs if projection is None else (*pairs, projection)
    if _unfused_input_reason(every, x, projection is not None or not shortcut) is not None:
        return None
    convs = [_contract(conv, norm, x) for conv, norm in every]
    relu = type(act) is nn.ReLU
    if not shortcut:
        return functional.plain_block(x, *convs, relu=relu)
    by: functional.ConvNorm | functional.Pad | None = None
    if projection is not None:
        by = convs.pop()
    elif isinstance(downsample, PadShortcut):
        by = functional.Pad(downsample.stride, *downsample.padding)
    block: Any = functional.basic_block if len(convs) == 2 else functional.bottleneck
    return block(x, *convs, by, projected=pooled(downsample, x), relu=relu)  # type: ignore[no-any-return]


def _contract(conv: Any, norm: nn.Module, x: Tensor) -> functional.ConvNorm:
    weight = weight_of(conv, x)
    return functional.ConvNorm(weight, batch_norm_of(norm), conv.stride[0], conv.dilation[0], conv.groups)
