"""From the children of a stem to ``functional``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedres import functional
from fusedres.nn.casts import convolve, weight_of
from fusedres.nn.chain import Pairs, fused_chain, growth_by, is_small, unfused_chain_reason
from fusedres.nn.fuse import (
    altered,
    batch_norm_act,
    batch_norm_of,
    convolved_dtype,
    is_plain,
    is_recomputed,
    traced,
    unfused_dtype_reason,
    unfused_reason,
)

_CONV = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1}
_MAXPOOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}


def _is_convolution(conv: Any) -> bool:
    return (
        type(conv) is nn.Conv2d
        and all(getattr(conv, name) == value for name, value in _CONV.items())
        and conv.padding_mode == "zeros"
        and conv._parameters["bias"] is None
        and is_plain(conv._parameters.get("weight"))
        and altered(conv) is None
    )


def _is_pool(pool: nn.Module) -> bool:
    return (
        type(pool) is nn.MaxPool2d
        and all(getattr(pool, name) in (value, (value, value)) for name, value in _MAXPOOL.items())
        and not pool.ceil_mode
        and not pool.return_indices
        and altered(pool) is None
    )


def _deep(conv: nn.Module) -> tuple[Pairs, nn.Module, nn.Module] | None:
    """ResNet-C's three convolutions of 3x3: two with their norms, the ReLU behind each, and the last one."""
    if type(conv) is not nn.Sequential or len(conv) != 7 or altered(conv) is not None:
        return None
    conv1, norm1, act1, conv2, norm2, act2, last = conv
    if type(act1) is not type(act2) or altered(act2) is not None:
        return None
    return ((conv1, norm1), (conv2, norm2)), act1, last


def unfused_stem_reason(conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module) -> str | None:
    """Why a stem doesn't run as one Function, ResNet-C's as two, whatever its input; None if it does.

    Args:
        conv: as of :func:`stem`, and so are the others.
    """
    deep = _deep(conv)
    if deep is not None:
        why = unfused_chain_reason(*deep[:2])
        if why is not None:
            return why
    elif not _is_convolution(conv):
        return "the stem's convolution is not a plain 7x7 of stride 2 and padding 3"
    if not _is_pool(pool):
        return "the stem's pool is not a plain 3x3 max pool of stride 2 and padding 1"
    if type(act) is not nn.ReLU:
        return f"the activation is a {type(act).__name__}, not an nn.ReLU"
    return unfused_reason(norm, act)


def stem(conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(act(norm(conv(x))))``: as one where nothing speaks against it.

    Args:
        conv: fused if it is exactly an nn.Conv2d of 7x7, stride 2 and padding 3, without a bias.
            Of ResNet-C's three of 3x3 (He et al. 2018, "Bag of tricks") the first two are one Function.
        norm: a batch norm; anything else is called.
        act: fused if it is exactly an nn.ReLU.
        pool: fused if it is exactly an nn.MaxPool2d of 3x3, stride 2 and padding 1.
        x: [N, C, H, W], images.
    """
    if (
        type(conv) is nn.Conv2d
        and is_small(x, growth_by(conv))
        and type(norm) is not nn.SyncBatchNorm
        and not is_recomputed()
    ):
        return pool(act(norm(conv(x))))  # type: ignore[no-any-return]
    # before a parameter is read, which fx would record
    if (
        traced(x) is None
        and x.dim() == 4
        and _deep(conv) is None
        and unfused_stem_reason(conv, norm, act, pool) is None
        and unfused_dtype_reason(norm, convolved_dtype(x)) is None
    ):
        weight = weight_of(conv, x)
        return functional.stem(x, functional.ConvNorm(weight, batch_norm_of(norm), 2))
    return batch_norm_act_maxpool(norm, act, pool, _convolved(conv, x))


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    deep = _deep(conv)
    if deep is not None:
        pairs, act, last = deep
        fused = fused_chain(pairs, act, x, shortcut=False)
        if fused is not None:
            return convolve(last, fused)
    return convolve(conv, x)


def batch_norm_act_maxpool(norm: nn.Module, act: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(act(norm(x)))``, the stem behind its convolution: in one pass where nothing speaks against it.

    Args:
        norm: a batch norm; anything else is called.
        act: fused if it is exactly an nn.ReLU.
        pool: fused if it is exactly an nn.MaxPool2d of 3x3, stride 2 and padding 1.
        x: [N, C, H, W], bf16 | fp16 | fp32, channels_last or NCHW.
    """
    if _is_pool(pool) and type(act) is nn.ReLU and unfused_reason(norm, act, x) is None:
        own = batch_norm_of(norm)
        return functional.bn_relu_maxpool(
            x, *own[:4], training=own.training, momentum=own.momentum, eps=own.eps, group=own.group
        )
    return pool(batch_norm_act(norm, act, x))  # type: ignore[no-any-return]
