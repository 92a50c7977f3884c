"""Layers on a CPU: oneDNN's convolutions with bias, residual and ReLU inside, weights packed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres.inference.bound import Bound
from fusedres.inference.layers import ConvBiasAct, Stem
from fusedres.inference.pool import pool

_OPS: Any = torch.ops.mkldnn
_reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined,unused-ignore]


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


class Packs:
    """Weights in the blocked layouts that oneDNN would bring them into in every call.

    Which layout is best depends on the whole shape of the input; a weight in another one costs up to a
    hundred times the convolution. Shapes that ask for the same share it.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, bytes], Tensor] = {}

    def of(self, layer: ConvBiasAct, x: Tensor) -> Tensor:
        packed: Tensor = _reorder(
            *(layer.weight.detach().to_mkldnn(), layer.padding, layer.stride, layer.dilation),
            *(layer.groups, x.shape),
        )
        layout = _OPS._get_mkldnn_serialized_md(packed).numpy().tobytes()
        return self._packed.setdefault((id(layer), layout), packed)


def bind_conv(layer: ConvBiasAct, x: Tensor, packs: Packs, *, residual: bool, reuse: bool) -> Bound:
    """``layer`` on inputs of ``x``'s shape; with ``reuse`` into the residual's memory."""
    bias = None if layer.bias is None else layer.bias.detach()
    sizes = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    packed = (packs.of(layer, x), bias, *sizes)
    if not residual:
        conv = _OPS._convolution_pointwise.default
        return Bound(conv, (*packed, "relu" if layer.relu else "none", [], ""))
    added: tuple[Any, ...] = (*packed, "add", 1.0, "relu" if layer.relu else None, [], "")
    if reuse:
        add_to = _OPS._convolution_pointwise_.binary
        return Bound(lambda x, residual, *constants: add_to(residual, x, *constants), added)
    return Bound(_OPS._convolution_pointwise.binary, added)


def bind_stem(layer: Stem, x: Tensor, packs: Packs) -> Bound:
    conv = bind_conv(layer, x, packs, residual=False, reuse=False)
    return Bound(lambda x, *constants: pool(conv.run(x, *constants), None), conv.constants)
