"""int8 layers: the convolution of 8-bit activations and weights, as modules of PyTorch's own operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.inference.layers import ConvBiasAct

LEVELS = 255
WEIGHT_LEVELS = 127


class Scale(NamedTuple):
    """An 8-bit value q stands for (q - zero) * step (Jacob et al. 2018, equation 1).

    Stored as uint8, or as int8: q - 128, since a GPU's tensor cores multiply signed values alone.
    """

    step: float
    zero: int

    def stored_zero(self, stored: torch.dtype) -> int:
        """``zero`` as it is stored."""
        return self.zero + torch.iinfo(stored).min

    def quantize(self, x: Tensor, stored: torch.dtype = torch.uint8) -> Tensor:
        least = torch.iinfo(stored).min
        q = torch.round(x.float() / self.step + self.stored_zero(stored))
        return q.clamp(least, least + LEVELS).to(stored)

    def dequantize(self, q: Tensor) -> Tensor:
        return (q.float() - self.stored_zero(q.dtype)) * self.step


class Quantize(nn.Module):
    """[N, C, H, W], floating point -> the same in 8 bits."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.quantize(x)

    def extra_repr(self) -> str:
        return f"step={self.scale.step:.4g}, zero={self.scale.zero}"


class Dequantize(Quantize):
    """[N, C, H, W], 8 bits -> the same in floating point."""

    like: Tensor

    def __init__(self, scale: Scale, dtype: torch.dtype) -> None:
        super().__init__(scale)
        # of the dtype that comes out: follows the model to another, as the layers behind it do
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.dequantize(x).to(self.like.dtype)


class QuantizedConv(nn.Module):
    """relu(conv(x) + bias + residual) with 8-bit activations in and out; sums are exact until the rounding.

    Weights are signed, with a step for every filter and no zero point; activations unsigned, with one step.

    Args:
        layer: what to quantise.
        x: scale of the input.
        residual: of the residual; None without one.
        out: of the output.
    """

    weight: Tensor
    weight_step: Tensor
    bias: Tensor

    def __init__(self, layer: ConvBiasAct, x: Scale, residual: Scale | None, out: Scale) -> None:
        super().__init__()
        weight = layer.weight.detach().double()
        step = weight.abs().amax(dim=(1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny) / WEIGHT_LEVELS
        levels = torch.round(weight / step[:, None, None, None])
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("weight", levels.to(torch.int8))
        self.register_buffer("weight_step", step.float())
        self.register_buffer("bias", bias.clone())
        self.x, self.residual, self.out = x, residual, out
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups, self.relu = layer.groups, layer.relu

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Follows a model to another device, but keeps its types."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # type: ignore[no-untyped-call]

    @property
    def op(self) -> str:
        """What it computes, in words."""
        return "8-bit conv + bias" + " + ReLU" * self.relu

    def extra_repr(self) -> str:
        filters, channels, *side = self.weight.shape
        return (
            f"{channels * self.groups}, {filters}, kernel_size={tuple(side)}, stride={self.stride}, "
            f"padding={self.padding}, relu={self.relu}"
        )

    def float_weight(self) -> Tensor:
        """[K, C / groups, R, S], float32"""
        return self.weight.float() * self.weight_step[:, None, None, None]

    def in_floating_point(self, dtype: torch.dtype) -> ConvBiasAct:
        """The convolution that it is between two conversions."""
        sizes: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        return ConvBiasAct(self.float_weight(), self.bias, *sizes, relu=self.relu).to(dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        """[N, C, H, W] (and [N, K, P, Q]) -> [N, K, P, Q], all uint8, or all int8"""
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        y = F.conv2d(self.x.dequantize(x), self.float_weight(), self.bias, *sizes)
        if residual is not None and self.residual is not None:
            y = y + self.residual.dequantize(residual)
        return self.out.quantize(y.relu() if self.relu else y, x.dtype)
