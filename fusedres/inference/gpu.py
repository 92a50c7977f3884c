"""Layers on a GPU: our kernels or cuDNN's fused convolutions, whichever is measured faster."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import autotune, ops, plan
from fusedres.inference.bound import Bound
from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.inference.pool import pool
from fusedres.inference.prepared import Prepared
from fusedres.inference.quantized import QuantizedConv

_OPS: Any = torch.ops.fusedres
_ATEN: Any = torch.ops.aten
NO_KERNEL = "no kernel of ours for its padding, dilation, groups or stride"
_STEM = {"stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1}


def bind_conv(layer: ConvBiasAct, x: Tensor, residual: Tensor | None, prepared: Prepared) -> Bound:
    """``layer`` on inputs of ``x``'s shape."""
    kernel, cudnns = _kernel(layer, prepared), library(layer, residual is not None, prepared)
    if kernel is None:
        return cudnns._replace(reason=NO_KERNEL)
    tensors = (x,) if residual is None else (x, residual)

    def run(fused: bool) -> Tensor:
        bound = kernel if fused else cudnns
        return bound.run(*tensors, *bound.constants)

    conv = ops.conv_shape(x, layer.weight, layer.stride[0], pending=False, residual=residual is not None)
    if not autotune.fused("conv_bias_act", x, conv, run):
        return cudnns._replace(reason=choice("conv_bias_act", x, conv).reason)
    implementation, reason, _ = choice("conv_bias_act", x, conv)
    return kernel._replace(implementation=implementation, reason=reason)


def bind_stem(layer: Stem, x: Tensor, prepared: Prepared) -> Bound:
    """Likewise: in one launch, or with a bias that waits for the pass that finds the maxima."""
    weight, bias = channels_last(layer, prepared), float32_bias(layer, prepared)
    usual = all(getattr(layer, name) == value for name, value in _STEM.items())
    if not usual or tuple(weight.shape[1:]) != (3, 7, 7):
        bound = bind_conv(layer, x, None, prepared)
        return bound._replace(run=lambda x, *constants: pool(bound.run(x, *constants), None))

    def conv(x: Tensor, fused: bool) -> Tensor:
        if fused:
            return _OPS.stem_conv(x, weight, None, None, 0.0, False, x.dtype)[0]  # type: ignore[no-any-return]
        return F.conv2d(x, weight, None, layer.stride, layer.padding)

    # compared as the training stem is, whose measurement serves too
    shape = ops.stem_shape(x, weight, x.dtype)
    fused = autotune.fused("stem_conv", x, shape, functools.partial(conv, x))

    def in_passes(x: Tensor) -> Tensor:
        return pool(conv(x, fused), bias)

    def at_once(x: Tensor) -> Tensor:
        return _OPS.stem_bias_act(x, weight, bias, None, None, True, x.dtype)  # type: ignore[no-any-return]

    if autotune.fused("stem_bias_act", x, shape, lambda one: (at_once if one else in_passes)(x)):
        implementation, reason, _ = choice("stem_bias_act", x, shape)
        return Bound(at_once, (), implementation, reason)
    implementation, reason, _ = choice("stem_conv", x, shape)
    return Bound(in_passes, (), implementation if fused else "cudnn", reason)


def bind_average_pool(layer: nn.AdaptiveAvgPool2d, x: Tensor) -> Bound | None:
    """In one pass of ours, if it is the mean over all pixels."""
    if layer.output_size not in (1, (1, 1)):
        return None
    implementation, reason, _ = choice("global_avg_pool", x)
    run = layer if implementation == "aten" else _OPS.global_avg_pool.default
    return Bound(run, (), implementation, reason)


def choice(op: str, x: Tensor, conv: plan.Conv | None = None) -> plan.Choice:
    """What was settled for an op; for a convolution, on its shape."""
    return ops.choice(op, x.device, x.dtype, ops.forced_backend(), conv)


def fits(layer: ConvBiasAct | QuantizedConv) -> bool:
    """Whether our convolutions have a layer's shape."""
    side = layer.weight.shape[2]
    return (
        side in (1, 3)
        and layer.weight.shape[3] == side
        and layer.stride in ((1, 1), (2, 2))
        and layer.padding == (side // 2, side // 2)
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


def _kernel(layer: ConvBiasAct, prepared: Prepared) -> Bound | None:
    """Our kernel for a layer; None for a shape that it isn't made for."""
    if not fits(layer):
        return None
    stride = layer.stride[0]
    weight, bias = channels_last(layer, prepared), float32_bias(layer, prepared)
    op = _OPS.conv_bias_act.default

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        return op(x, weight, bias, residual[0] if residual else None, layer.relu, stride)  # type: ignore[no-any-return]

    return Bound(run)


def library(layer: ConvBiasAct, residual: bool, prepared: Prepared) -> Bound:
    """cuDNN's convolution with as much behind it as cuDNN has; it has no addition without a ReLU."""
    weight = channels_last(layer, prepared)
    bias = None if layer.bias is None else layer.bias.detach()
    sizes: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.relu and weight.is_cuda and weight.dtype != torch.float64:
        if residual:
            add_relu = _ATEN.cudnn_convolution_add_relu.default
            return Bound(lambda x, residual: add_relu(x, weight, residual, 1.0, bias, *sizes), (), "cudnn")
        return Bound(_ATEN.cudnn_convolution_relu.default, (weight, bias, *sizes), "cudnn")

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, *sizes)
        for r in residual:
            y = y + r
        return y.relu() if layer.relu else y

    return Bound(run)


def channels_last(layer: ConvBiasAct | QuantizedConv, prepared: Prepared) -> Tensor:
    """The weight as GPU kernels read it; PyTorch would copy it in every call."""
    return prepared.of(
        layer,
        torch.channels_last,
        lambda: layer.weight.detach().contiguous(memory_format=torch.channels_last),
    )


def float32_bias(layer: ConvBiasAct, prepared: Prepared) -> Tensor | None:
    bias = layer.bias
    return None if bias is None else prepared.of(layer, torch.float32, lambda: bias.detach().float())
