"""The cases of the convolution ops: ResNet-50's layers, as its blocks call them in training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_check_cases import EPS, Inputs, Outputs, _activation, _parameters, _wide
from shapes import Conv
from torch import Tensor, nn

import fusedres
from fusedres import plan
from fusedres.cli.bench.eager import EagerBlock, EagerResNet
from fusedres.ops import stats_dtype
from fusedres.plan import traffic
from fusedres.plan.conv import PEAK

_OPS = torch.ops.fusedres


class Layer(NamedTuple):
    """A convolution, and what a block asks of it.

    Args:
        conv: its shape.
        place: "inner", behind a batch norm of its block; "first", on the block's input, whose gradient has
            the shortcut's added; "projection", of the shortcut.
        compact: for the first one, whether the shortcut's gradient is of every second pixel.
    """

    conv: Conv
    place: str
    compact: bool

    def __str__(self) -> str:
        return f"{self.place} {self.conv}"

    @property
    def inner(self) -> bool:
        return self.place == "inner"

    @property
    def subsampled(self) -> bool:
        """Whether only pixels at even rows and columns of a block's input are looked at."""
        return self.place == "projection" and self.conv.size == 1 and self.conv.stride == 2

    @property
    def size(self) -> tuple[int, int]:
        """Of the output."""
        return _strided(self.conv, self.conv.stride)

    @property
    def weights(self) -> int:
        return self.conv.outputs * self.conv.inputs * self.conv.size**2

    def planned(self, batch: int) -> plan.Conv:
        """As the planner sees it."""
        inputs, outputs, side, stride, height, width = self.conv
        return plan.Conv(batch, inputs, height, width, outputs, side, stride, pending=self.inner)

    def flop(self, batch: int) -> int:
        """Of the product, the same in each direction."""
        return 2 * batch * math.prod(self.size) * self.weights


def _strided(conv: Conv, stride: int) -> tuple[int, int]:
    return (conv.height - 1) // stride + 1, (conv.width - 1) // stride + 1


def block_layers(model: str, image_size: int) -> Counter[Layer]:
    """The distinct convolutions of a net's blocks, and how many there are of each."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        net, image = EagerResNet(model), torch.empty(1, 3, image_size, image_size)

    def see(name: str, strided: bool) -> Callable[[nn.Conv2d, tuple[Tensor, ...]], None]:
        place = {"conv1": "first", "downsample.0": "projection"}.get(name, "inner")

        def hook(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            channels, height, width = inputs[0].shape[1:]
            size, stride = module.kernel_size[0], module.stride[0]
            conv = Conv(channels, module.out_channels, size, stride, height, width)
            found[Layer(conv, place, strided and place == "first")] += 1

        return hook

    for block in net.modules():
        if isinstance(block, EagerBlock):
            convs = {name: m for name, m in block.named_modules() if isinstance(m, nn.Conv2d)}
            strided = any(conv.stride[0] == 2 for conv in convs.values())
            for name, conv in convs.items():
                conv.register_forward_pre_hook(see(name, strided))
    net.eval()(image)
    return found


class Call(NamedTuple):
    """An op on a layer.

    Args:
        op: its name.
        conv: its shape, as the planner sees it.
        bytes: that it has to move: each full tensor, and the weight, once.
        flop: of the product.
        run: calls it under whatever backend is forced, on the inputs.
        expected: its first output, under the reference backend; in float64 for float32.
        plain: PyTorch's convolution alone, on what is written already.
        composed: PyTorch's convolution with the batch-norm ops that stand for what is fused.
        summed: what its second output has to be for a first output: the vectors of what was stored.
        halved: of the composed ones, a pass that serves two convolutions.
    """

    op: str
    conv: plan.Conv
    bytes: int
    flop: int
    run: Callable[[], Outputs]
    expected: Callable[[], Tensor]
    plain: Callable[[], object]
    composed: Callable[[], Outputs]
    summed: Callable[[Tensor], Tensor] | None = None
    halved: Callable[[], object] | None = None

    def floor_ms(self, gbps: float, dtype: torch.dtype) -> tuple[float, str]:
        """The least time, and what it is bound by."""
        memory = 1e-6 * self.bytes / gbps
        arithmetic = 1e3 * self.flop / PEAK[str(dtype).removeprefix("torch.")]
        return max((memory, "memory"), (arithmetic, "arithmetic"))


def calls(layer: Layer, batch: int, device: str, dtype: torch.dtype) -> list[Call]:
    """The three ops on a layer, as a block calls them in training."""
    t = _inputs(layer, batch, device, dtype)
    # 16 bits: the reference computes in float32, and rounds where the kernels do
    wide = _wide(t) if dtype == torch.float32 else t

    def call(op: str, run: Callable[[Inputs], Outputs], **more: Any) -> Call:
        moved = bytes_moved(op, layer, batch, dtype)
        conv = layer.planned(batch)
        if op == "conv_dgrad" and layer.subsampled:  # see there
            _, _, height, width = conv.out_shape
            conv = conv._replace(height=height, width=width, stride=1)
        flop = layer.flop(batch)
        return Call(op, conv, moved, flop, run=lambda: run(t), expected=lambda: run(wide)[0], **more)

    return [_fwd(layer, t, call), _dgrad(layer, t, call), _wgrad(layer, t, call)]


def _fwd(layer: Layer, t: Inputs, call: Callable[..., Call]) -> Call:
    stride = layer.conv.stride

    def run(t: Inputs) -> Outputs:
        arguments = (t.x, t.x_stats, None, None, layer.inner, t.weight, stride)
        return _OPS.conv_fwd(*arguments, t.gamma, t.beta, EPS, True)[:2]

    def composed() -> Outputs:
        y = _aten(_activated(t), t.weight, stride)
        return y, _OPS.bn_stats(y, t.gamma, t.beta, EPS)

    return call(
        "conv_fwd",
        run,
        summed=lambda y: _OPS.bn_stats(y, t.gamma.to(stats_dtype(y)), t.beta.to(stats_dtype(y)), EPS),
        plain=lambda: _aten(t.a, t.weight, stride),
        composed=composed,
    )


def _dgrad(layer: Layer, t: Inputs, call: Callable[..., Call]) -> Call:
    # the pixels that went into a strided 1x1 of the shortcut: their gradient, as if there were no others
    source, stride = (t.x[:, :, ::2, ::2], 1) if layer.subsampled else (t.x, layer.conv.stride)

    def run(t: Inputs) -> Outputs:
        arguments = (t.du, t.y, t.y_stats, t.y_sums, t.weight, stride, *source.shape[2:], t.add, 0)
        if layer.inner:
            return _OPS.conv_dgrad(*arguments, t.x, t.x_stats, True, True)
        return _OPS.conv_dgrad(*arguments, None, None, False, False)[:1]

    def composed() -> Outputs:
        dx = _aten_backward(_applied(t), source, t.weight, stride, 0)
        if t.add is not None:
            (dx if t.add.shape == dx.shape else dx[:, :, ::2, ::2]).add_(t.add)
        # the mask is left to the pass that comes next
        return (dx, _sums(dx, t.x, t.x_stats, relu=True)) if layer.inner else (dx,)

    return call(
        "conv_dgrad",
        run,
        summed=(lambda dx: _sums(dx, t.x, t.x_stats, relu=False)) if layer.inner else None,
        plain=lambda: _aten_backward(t.dy, source, t.weight, stride, 0),
        composed=composed,
        halved=lambda: _applied(t),
    )


def _wgrad(layer: Layer, t: Inputs, call: Callable[..., Call]) -> Call:
    stride = layer.conv.stride

    def run(t: Inputs) -> Outputs:
        arguments = (t.du, t.y, t.y_stats, t.y_sums, t.x, t.x_stats, layer.inner)
        return (_OPS.conv_wgrad(*arguments, t.weight, stride),)

    return call(
        "conv_wgrad",
        run,
        plain=lambda: _aten_backward(t.dy, t.a, t.weight, stride, 1),
        composed=lambda: (_aten_backward(_applied(t), _activated(t), t.weight, stride, 1),),
        halved=lambda: _applied(t),
    )


def bytes_moved(op: str, layer: Layer, batch: int, dtype: torch.dtype) -> int:
    """Bytes that an op has to move: each full tensor once and the weight once, vectors not counted."""
    sizes = traffic.around(layer.planned(batch), str(dtype).removeprefix("torch."))
    if layer.subsampled:
        sizes["dx"] = sizes["x"]
    if layer.compact:
        sizes["add"] = sizes["add"]._replace(
            values=batch * layer.conv.inputs * math.prod(_strided(layer.conv, 2))
        )
    return traffic.moved(op, layer.place, sizes).bytes


def _inputs(layer: Layer, batch: int, device: str, dtype: torch.dtype) -> Inputs:
    conv = layer.conv
    x_shape = (batch, conv.inputs, conv.height, conv.width)
    y_shape = (batch, conv.outputs, *layer.size)
    t = Inputs(x=_activation(x_shape, dtype, device, mean=0.5), x_stats=None, add=None)
    t.y, t.du = (_activation(y_shape, dtype, device, mean=0.5) for _ in range(2))
    weight = torch.randn(conv.outputs, conv.inputs, conv.size, conv.size, device=device)
    t.weight = (weight / weight[0].numel() ** 0.5).to(dtype, memory_format=torch.channels_last)
    t.gamma, t.beta = _parameters(conv.outputs, device)
    if layer.place == "first":
        of_add = _strided(conv, 2) if layer.compact else x_shape[2:]
        t.add = _activation((*x_shape[:2], *of_add), dtype, device)
    with fusedres.backend("reference"):
        if layer.inner:
            t.x_stats = _OPS.bn_stats(t.x, *_parameters(conv.inputs, device), EPS)
        t.y_stats = _OPS.bn_stats(t.y, t.gamma, t.beta, EPS)
        t.y_sums = _sums(t.du, t.y, t.y_stats, relu=False)
        t.a, t.dy = _activated(t), _applied(t)
    return t


def _activated(t: Inputs) -> Tensor:
    return t.x if t.x_stats is None else _OPS.bn_act(t.x, t.x_stats, None, None, True)


def _applied(t: Inputs) -> Tensor:
    return _OPS.bn_act_backward_apply(t.du, t.y, t.y_stats, t.y_sums, None, None, None, False)[0]


def _sums(du: Tensor, x: Tensor, stats: Tensor, relu: bool) -> Tensor:
    x, stats = x.to(du.dtype), stats.to(stats_dtype(du))
    return _OPS.bn_act_backward_reduce(du, x, None, stats, None, None, relu)[1]


def _aten(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, weight.shape[2] // 2)


def _aten_backward(dy: Tensor, x: Tensor, weight: Tensor, stride: int, which: int) -> Tensor:
    """The gradient of the input (0) or of the weight (1)."""
    padding = [weight.shape[2] // 2] * 2
    arguments = (None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, [which == 0, which == 1, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, *arguments)[which]
