"""8-bit layers on a GPU: our Triton kernel, or a convolution in floating point between two conversions,
whichever is measured faster.

Between the layers levels are stored as int8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import autotune, ops
from fusedres.inference import gpu
from fusedres.inference.bound import Bound
from fusedres.inference.prepared import Prepared
from fusedres.inference.quantized import Dequantize, Quantize, QuantizedConv, Scale

STORED = torch.int8
_OPS: Any = torch.ops.fusedres
# between two conversions: its significand has a level's 8 bits
_CONVERTED = torch.bfloat16


class _Arguments(NamedTuple):
    """What the op is given beside the activations: tensors, and settings."""

    tensors: tuple[Tensor, ...]
    settings: tuple[Any, ...]


def bind(
    layer: Quantize | QuantizedConv, tensors: Sequence[Tensor], out: torch.dtype | None, prepared: Prepared
) -> Bound | None:
    """``layer`` on inputs of the shapes of ``tensors``; None where nothing is better than calling it.

    Args:
        layer: a convolution, or the conversion at either end.
        tensors: in floating point, or levels as they are stored here.
        out: the dtype of a result in floating point, where only that is read; None for levels.
        prepared: what programs share.
    """
    if isinstance(layer, QuantizedConv):
        return _bind_conv(layer, tuple(tensors), out, prepared)
    if not isinstance(layer, Dequantize):
        return _quantize(layer.scale, tensors[0])
    return Bound(lambda x: x, reason="nothing to convert") if tensors[0].is_floating_point() else None


def _quantize(scale: Scale, x: Tensor) -> Bound:
    """To levels as they are stored here; PyTorch's operators would take several passes."""
    chosen = ops.choice("quantize_int8", x.device, x.dtype, ops.forced_backend())
    if chosen.implementation == "aten":
        return Bound(scale.quantize, (STORED,))
    constants = (scale.step, scale.stored_zero(STORED))
    return Bound(_OPS.quantize_int8.default, constants, chosen.implementation, chosen.reason)


def _bind_conv(
    layer: QuantizedConv, tensors: tuple[Tensor, ...], out: torch.dtype | None, prepared: Prepared
) -> Bound:
    @functools.cache  # made once, and only if it is tried or chosen
    def bound(fused: bool) -> Bound:
        return _kernel(layer, out, prepared) if fused else _converted(layer, tensors, out, prepared)

    if not gpu.fits(layer):
        return bound(False)._replace(reason=gpu.NO_KERNEL)
    x, residual = tensors[0], len(tensors) > 1
    conv = ops.conv_shape(x, layer.weight, layer.stride[0], pending=False, residual=residual)
    fused = autotune.fused("conv_int8", x, conv, lambda fused: bound(fused).run(*tensors))
    return bound(fused)._replace(reason=gpu.choice("conv_int8", x, conv).reason)


def _kernel(layer: QuantizedConv, out: torch.dtype | None, prepared: Prepared) -> Bound:
    (border, *tensors), settings = prepared.of(
        layer, (STORED, out), lambda: _arguments(layer, out, gpu.channels_last(layer, prepared))
    )
    op = _OPS.conv_int8.default

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        return op(x, border, *tensors, residual[0] if residual else None, *settings)  # type: ignore[no-any-return]

    return Bound(run, (), "triton")


def _arguments(layer: QuantizedConv, out: torch.dtype | None, weight: Tensor) -> _Arguments:
    """By the formulas of ``ops.conv_int8``, in float64."""
    zero = layer.x.stored_zero(STORED)
    step, out_zero = (layer.out.step, layer.out.stored_zero(STORED)) if out is None else (1.0, 0)
    bias, residual_step = layer.bias.double() / step + out_zero, 0.0
    if layer.residual is not None:
        residual_step = layer.residual.step / step
        bias = bias - layer.residual.stored_zero(STORED) * residual_step
    tensors = (
        torch.full(weight.shape[1:2], zero, dtype=STORED, device=weight.device),
        weight,
        (-zero * weight.sum((1, 2, 3), dtype=torch.int64)).int(),
        (layer.weight_step.double() * (layer.x.step / step)).float(),
        bias.float(),
    )
    floor = float(out_zero) if layer.relu else -math.inf
    return _Arguments(tensors, (residual_step, floor, layer.stride[0], out or STORED))


def _converted(
    layer: QuantizedConv, tensors: tuple[Tensor, ...], out: torch.dtype | None, prepared: Prepared
) -> Bound:
    plain = prepared.of(layer, _CONVERTED, lambda: layer.in_floating_point(_CONVERTED))
    scales = [scale for scale in (layer.x, layer.residual) if scale is not None]

    def converted(given: tuple[Tensor, ...]) -> list[Tensor]:
        return [scale.dequantize(t).to(_CONVERTED) for scale, t in zip(scales, given, strict=True)]

    x, *residual = converted(tensors)
    conv = gpu.bind_conv(plain, x, residual[0] if residual else None, prepared)
    quantize = _quantize(layer.out, x)

    def run(*given: Tensor) -> Tensor:
        y = conv.run(*converted(given), *conv.constants)
        return quantize.run(y, *quantize.constants) if out is None else y.to(out)

    return Bound(run, (), conv.implementation, f"in {_CONVERTED} between two conversions")
