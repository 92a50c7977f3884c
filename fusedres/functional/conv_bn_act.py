"""conv_bn_act, basic_block and bottleneck: convolutions with their batch norms, ReLUs and a shortcut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.functional.autograd import differentiated, transformed
from fusedres.functional.batch_norm import check_activation, check_batch_norm
from fusedres.functional.bn_act import bn_act_of
from fusedres.functional.chain import (
    Chain,
    ConvNorm,
    FusedBasicBlock,
    FusedBottleneck,
    FusedConvBNAct,
    FusedPlainBlock,
    Pad,
    Shortcut,
    run,
)


def conv_bn_act(x: Tensor, conv: ConvNorm, *, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """A convolution, its batch norm, the residual add and the ReLU: ``relu(norm(conv(x)) + residual)``.

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32 | fp64; under autocast it and the weight are cast.
        conv: the convolution with its batch norm; running statistics are updated in place when training.
        residual: [N, K, P, Q], dtype of the output, or None.
        relu: apply the ReLU.

    Returns:
        [N, K, P, Q] with P = (H - 1) // stride + 1, dtype of x (autocast's, if that is on).

    Raises:
        TypeError, ValueError: a dtype, shape or device that doesn't fit.
        RuntimeError: a forced backend (:func:`fusedres.backend`) can't serve the call.
    """
    shortcut: Shortcut = "none" if residual is None else "residual"
    return _checked(FusedConvBNAct, x, {"conv": conv}, shortcut, relu, residual)


def basic_block(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    shortcut: ConvNorm | Pad | None = None,
    *,
    projected: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """A residual block of two convolutions (He et al. 2015, figure 5 left, equations 1 and 2).

    Kept for the backward are x, the output, the raw outputs of the convolutions and per-channel vectors.

    Args:
        x: [N, C, H, W], bf16 | fp16 | fp32 | fp64; under autocast it and the weights are cast.
        conv1: 3x3, with its batch norm.
        conv2: 3x3, likewise.
        shortcut: a projection (option B), zero padding (option A), or None for an identity.
        projected: what the projection gets instead of x, as an average pool of x (He et al. 2018, "Bag of
            tricks", ResNet-D); dtype of x.
        relu: apply the ReLUs, between the convolutions and behind the sum.

    Returns:
        [N, K, P, Q], dtype of x (autocast's, if that is on).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`conv_bn_act`.
    """
    named = {"conv1": conv1, "conv2": conv2}
    return _block(FusedBasicBlock, x, named, shortcut, relu, projected)


def bottleneck(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    conv3: ConvNorm,
    shortcut: ConvNorm | Pad | None = None,
    *,
    projected: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """A residual block of three convolutions (He et al. 2015, figure 5 right).

    Args:
        x: [N, C, H, W], as in :func:`basic_block`, the others likewise.
        conv1: 1x1, with its batch norm.
        conv2: 3x3, likewise.
        conv3: 1x1, likewise.
        shortcut: a projection (option B), zero padding (option A), or None for an identity.
        projected: as in :func:`basic_block`.
        relu: apply the ReLUs.

    Returns:
        [N, K, P, Q], dtype of x (autocast's, if that is on).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`conv_bn_act`.
    """
    named = {"conv1": conv1, "conv2": conv2, "conv3": conv3}
    return _block(FusedBottleneck, x, named, shortcut, relu, projected)


def plain_block(x: Tensor, conv1: ConvNorm, conv2: ConvNorm, *, relu: bool = True) -> Tensor:
    """A basic block without its shortcut: the plain nets of He et al. 2015, section 3.3.

    Arguments, result and errors as in :func:`basic_block`.
    """
    return _checked(FusedPlainBlock, x, {"conv1": conv1, "conv2": conv2}, "none", relu)


def _block(
    function: type[Chain],
    x: Tensor,
    convs: dict[str, ConvNorm],
    shortcut: ConvNorm | Pad | None,
    relu: bool,
    projected: Tensor | None,
) -> Tensor:
    if isinstance(shortcut, ConvNorm):
        return _checked(function, x, convs | {"shortcut": shortcut}, "projection", relu, projected)
    if projected is not None:
        raise ValueError("projected is for a shortcut that is a projection")
    return _checked(function, x, convs, "identity" if shortcut is None else shortcut, relu)


def _checked(
    function: type[Chain],
    x: Tensor,
    named: dict[str, ConvNorm],
    shortcut: Shortcut,
    relu: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """The chain by kernels where they serve it, else by PyTorch's operators and ``bn_act``."""
    check_activation(x)
    projected = x if residual is None or shortcut != "projection" else residual
    if (projected.dim(), projected.dtype, projected.device) != (4, x.dtype, x.device):
        raise ValueError(
            f"projected must be 4D, {x.dtype} and on {x.device}, as x, "
            f"got {projected.dim()}D {projected.dtype} on {projected.device}"
        )
    shapes = _shapes(x, projected, named, shortcut)
    for (name, conv), shape in zip(named.items(), shapes, strict=True):
        check_batch_norm(x, conv.norm, f"{name}.norm.", shape)
    x, convs = _cast(x, named.values())
    if residual is not None and shortcut == "projection":
        residual = residual.to(x.dtype)
    elif residual is not None and (
        (residual.shape, residual.dtype, residual.device) != (shapes[-1], x.dtype, x.device)
    ):
        raise ValueError(
            f"residual must be {x.dtype} {list(shapes[-1])} on {x.device}, "
            f"got {residual.dtype} {list(residual.shape)} on {residual.device}"
        )
    if not _fits(x, shapes, convs):
        return _composed(x, convs, shortcut, relu, residual)
    layout = ops.layout(x)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    parameters = [p for conv in convs for p in (conv.weight, *conv.norm[:2])]
    if not differentiated(x, residual, *parameters):
        return run(x, residual, convs, shortcut, relu)[0]
    return function.apply(x, residual, convs, shortcut, relu, *parameters)  # type: ignore[no-any-return]


def _shapes(
    x: Tensor, projected: Tensor, named: dict[str, ConvNorm], shortcut: Shortcut
) -> list[tuple[int, ...]]:
    """The shapes of the raw outputs; ``projected`` is what a projection gets.

    Raises:
        ValueError: a weight or a shortcut that doesn't fit.
    """
    shapes = []
    shape: tuple[int, ...] = tuple(x.shape)
    for name, conv in named.items():
        if name != "shortcut":
            shape = _shape_behind(shape, conv, name)
            shapes.append(shape)
    n, channels, height, width = end = tuple(x.shape)
    if shortcut == "projection":
        end = _shape_behind(tuple(projected.shape), named["shortcut"], "shortcut")
        shapes.append(end)
    elif isinstance(shortcut, Pad):
        if shortcut.stride not in (1, 2) or min(shortcut.before, shortcut.after) < 0:
            raise ValueError(f"the shortcut pads with stride 1 or 2 and adds channels, got {shortcut}")
        size = ((side - 1) // shortcut.stride + 1 for side in (height, width))
        end = (n, channels + shortcut.before + shortcut.after, *size)
    if shortcut not in ("none", "residual") and end != shape:
        raise ValueError(f"the shortcut gives {list(end)}, the convolutions {list(shape)}")
    return shapes


def _convolved(x: Tensor, conv: ConvNorm) -> Tensor:
    padding = conv.geometry.padding(conv.weight)
    return F.conv2d(x, conv.weight, None, conv.stride, padding, conv.dilation, conv.groups)


def _fits(x: Tensor, shapes: Sequence[tuple[int, ...]], convs: Sequence[ConvNorm]) -> bool:
    """Whether the kernels take all of a chain; ``shapes`` are those of the raw outputs."""
    least = ops.served_from("bn_act", x.device, x.dtype, ops.forced_backend())
    if least is None or transformed() or torch.compiler.is_compiling():
        return False
    dtype = ops.stats_dtype(x)
    return all(
        math.prod(shape) >= max(least, 1) and conv.norm.kept_in(dtype) and conv.weight.dtype == x.dtype
        for shape, conv in zip(shapes, convs, strict=True)
    )


def _cast(x: Tensor, convs: Iterable[ConvNorm]) -> tuple[Tensor, list[ConvNorm]]:
    """Activations and weights in the dtype that autocast asks for, if it is on."""
    device = x.device.type
    if (
        not torch.amp.is_autocast_available(device)
        or not torch.is_autocast_enabled(device)
        or x.dtype == torch.float64
    ):
        return x, list(convs)
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), [conv._replace(weight=conv.weight.to(dtype)) for conv in convs]


def _composed(
    x: Tensor, convs: Sequence[ConvNorm], shortcut: Shortcut, relu: bool, residual: Tensor | None
) -> Tensor:
    """The same out of PyTorch's convolutions and ``bn_act``."""
    projection = convs[-1] if shortcut == "projection" else None
    chain = convs if projection is None else convs[:-1]
    out = x
    for conv in chain[:-1]:
        out = bn_act_of(_convolved(out, conv), conv.norm, None, None, None, relu)
    out = _convolved(out, chain[-1])
    if projection is not None:
        source = x if residual is None else residual
        residual = _convolved(source, projection)
        return bn_act_of(out, chain[-1].norm, None, residual, projection.norm, relu)
    if isinstance(shortcut, Pad):
        residual = shortcut.of(x)
    elif shortcut == "identity":
        residual = x
    return bn_act_of(out, chain[-1].norm, None, residual, None, relu)


def _shape_behind(shape: tuple[int, ...], conv: ConvNorm, name: str) -> tuple[int, ...]:
    """The shape of a convolution's raw output.

    Raises:
        ValueError: a weight that doesn't fit.
    """
    n, channels, height, width = shape
    weight = conv.weight
    if (
        weight.dim() != 4
        or weight.shape[1] * conv.groups != channels
        or weight.shape[2] != weight.shape[3]
        or weight.shape[2] % 2 == 0
    ):
        raise ValueError(
            f"{name}.weight must be [K, {channels} / groups, R, R] with odd R and groups {conv.groups}, "
            f"got {list(weight.shape)}"
        )
    if conv.stride < 1 or conv.dilation < 1:
        raise ValueError(f"{name}.stride and {name}.dilation must be positive")
    size = [(side - 1) // conv.stride + 1 for side in (height, width)]
    return (n, weight.shape[0], *size)
