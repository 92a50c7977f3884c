"""Layers on a CPU: oneDNN's convolutions with bias, residual and ReLU inside, and what follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.inference.bound import Bound
from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.inference.pool import pool
from fusedres.inference.prepared import Prepared
from fusedres.inference.quantized import QuantizedConv

_OPS: Any = torch.ops.mkldnn
_QUANTIZED: Any = torch.ops.onednn
_PACKED = ("onednn", "one pass, the weight packed for this shape")
_reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined,unused-ignore]


def _direct(op: Any) -> Any:
    """An operator without the Python around it, half a percent of a ResNet-50 on one image."""
    return getattr(op, "_op", op)


@functools.cache
def unavailable(dtype: torch.dtype) -> str | None:
    """Why oneDNN has no fast convolutions of a dtype on this CPU; None if it has."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: _OPS._is_mkldnn_bf16_supported,
        torch.float16: _OPS._is_mkldnn_fp16_supported,
    }
    if dtype not in supported or not supported[dtype]():
        return f"oneDNN has no fast convolution of {dtype} on this CPU"
    return None


def quantized_unavailable() -> str | None:
    """Why 8-bit convolutions aren't right or aren't fast on this CPU; None if they are.

    Without VNNI two products are added in 16 bits, which can overflow.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch is built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI"
    return None


def _shared(packed: Tensor, layer: nn.Module, prepared: Prepared) -> Tensor:
    """A packed weight, or one like it that is there already.

    oneDNN would bring a weight into the same blocked layout in every call. Which layout is best depends on
    the whole shape of the input, and one that is packed for another shape costs up to a hundred times the
    convolution; shapes that ask for the same layout share it.
    """
    layout = _OPS._get_mkldnn_serialized_md(packed).numpy().tobytes()
    return prepared.of(layer, layout, lambda: packed)


def _packed(layer: ConvBiasAct, x: Tensor, prepared: Prepared) -> Tensor:
    packed = _reorder(
        *(layer.weight.detach().to_mkldnn(), layer.padding, layer.stride, layer.dilation),
        *(layer.groups, x.shape),
    )
    return _shared(packed, layer, prepared)


def _packed_levels(layer: QuantizedConv, x: Tensor, prepared: Prepared) -> Tensor:
    packed = _QUANTIZED.qconv_prepack(
        *(layer.weight, layer.weight_step, *layer.x, layer.stride, layer.padding, layer.dilation),
        *(layer.groups, x.shape),
    )
    return _shared(packed, layer, prepared)


def bind_conv(layer: ConvBiasAct, x: Tensor, prepared: Prepared, *, residual: bool, reuse: bool) -> Bound:
    """``layer`` on inputs of ``x``'s shape; with ``reuse`` into the residual's memory."""
    bias = None if layer.bias is None else layer.bias.detach()
    sizes = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    packed = (_packed(layer, x, prepared), bias, *sizes)
    if not residual:
        conv = _direct(_OPS._convolution_pointwise.default)
        return Bound(conv, (*packed, "relu" if layer.relu else "none", [], ""), *_PACKED)
    added: tuple[Any, ...] = (*packed, "add", 1.0, "relu" if layer.relu else None, [], "")
    if reuse:
        add_to = _direct(_OPS._convolution_pointwise_.binary)
        return Bound(lambda x, residual, *constants: add_to(residual, x, *constants), added, *_PACKED)
    return Bound(_OPS._convolution_pointwise.binary, added, *_PACKED)


def quantized_candidates(
    layer: QuantizedConv, x: Tensor, prepared: Prepared, *, residual: bool, reuse: bool
) -> dict[str, Bound]:
    """The ways to run ``layer``: in 8 bits, or by a floating-point convolution between two conversions."""
    found = {}
    if quantized_unavailable() is None:
        found["int8"] = _quantized(layer, x, prepared, residual=residual, reuse=reuse)
    dtype = torch.float32 if unavailable(torch.bfloat16) else torch.bfloat16
    if unavailable(dtype) is None:
        found[str(dtype).removeprefix("torch.")] = _converted(layer, x, prepared, dtype, residual=residual)
    return found


def _converted(
    layer: QuantizedConv, x: Tensor, prepared: Prepared, dtype: torch.dtype, *, residual: bool
) -> Bound:
    plain = prepared.of(layer, dtype, lambda: layer.in_floating_point(dtype))
    conv = bind_conv(plain, x.to(dtype), prepared, residual=residual, reuse=residual)
    scales = (layer.x, layer.residual) if residual else (layer.x,)

    def run(*tensors: Tensor) -> Tensor:
        given = [s.dequantize(t).to(dtype) for s, t in zip(scales, tensors, strict=True) if s is not None]
        return layer.out.quantize(conv.run(*given, *conv.constants))

    return Bound(run, (), "onednn", f"in {plain.weight.dtype} between two conversions")


def _quantized(layer: QuantizedConv, x: Tensor, prepared: Prepared, *, residual: bool, reuse: bool) -> Bound:
    sizes = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    step, zero = layer.x
    weight = _packed_levels(layer, x, prepared)
    zeros = torch.zeros(len(layer.bias), dtype=torch.int64)
    given = (step, zero, weight, layer.weight_step, zeros)
    out = (layer.out.step, layer.out.zero, torch.uint8)
    if not residual or layer.residual is None:
        conv = _direct(_QUANTIZED.qconv2d_pointwise.default)
        act = "relu" if layer.relu else "none"
        return Bound(conv, (*given, layer.bias, *sizes, *out, act, [], ""), *_PACKED)
    add_to = _direct(_QUANTIZED.qconv2d_pointwise.binary)
    added: tuple[Any, ...] = (
        layer.bias,
        *sizes,
        *out,
        *layer.residual,
        "sum",
        1.0,
        "relu" if layer.relu else "none",
        [],
        "",
    )
    if reuse:
        return Bound(lambda x, residual: add_to(x, *given, residual, *added), (), *_PACKED)
    return Bound(lambda x, residual: add_to(x, *given, residual.clone(), *added), (), *_PACKED)


def bind_stem(layer: Stem, x: Tensor, prepared: Prepared) -> Bound:
    conv = bind_conv(layer, x, prepared, residual=False, reuse=False)
    return conv._replace(run=lambda x, *constants: pool(conv.run(x, *constants), None))


def bind_average_pool(layer: nn.AdaptiveAvgPool2d, x: Tensor) -> Bound | None:
    """The mean over the image: as a window of its size, which is up to eight times as fast in 16 bits."""
    if layer.output_size not in (1, (1, 1)) or x.dtype.itemsize != 2:
        return None
    return Bound(F.avg_pool2d, (x.shape[2:],), reason="a window of the image's size")


def bind_linear(layer: nn.Linear, x: Tensor, prepared: Prepared) -> Bound | None:
    """bfloat16 alone: float32 would come out with twice the error of PyTorch's."""
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        return None
    packed = _shared(_OPS._reorder_linear_weight(layer.weight.detach(), len(x)), layer, prepared)
    bias = None if layer.bias is None else layer.bias.detach()
    return Bound(_direct(_OPS._linear_pointwise.default), (packed, bias, "none", [], ""), *_PACKED)
