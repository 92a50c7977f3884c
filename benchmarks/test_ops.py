"""Ops one layer at a time, on the layers of ResNet-18 and 50: in training, and a trained net's stem pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import BITS, COMPILE, FUSED, LAYOUTS, SIDES, Case, Side, compiled
from shapes import Conv, Norm
from torch import Tensor

from fusedres import functional
from fusedres.functional import BatchNorm, ConvNorm
from fusedres.plan import traffic
from fusedres.plan.traffic import Pass

BATCH = 8
EPS = 1e-5
STEM = (BATCH, 64, 112, 112)

Inputs = dict[str, Tensor]
Layer = Callable[[Inputs], Tensor]

each_side = pytest.mark.parametrize("side", SIDES)
each_dtype = pytest.mark.parametrize("dtype", list(BITS), ids=list(BITS.values()))


def random(
    shapes: Mapping[str, Sequence[int]], like: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Inputs, Tensor]:
    """Inputs, those with four axes in ``dtype`` and the others in fp32, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def values(shape: Sequence[int]) -> Tensor:
        t = torch.randn(*shape, generator=generator)
        return t.to(device, dtype, memory_format=torch.channels_last) if t.dim() == 4 else t.to(device)

    return {name: values(shape) for name, shape in shapes.items()}, values(like)


def case(
    fused: Layer,
    eager: Layer,
    inputs: Inputs,
    grad: Tensor | None,
    work: Sequence[Pass],
    op: str = "bn_act",
) -> Case:
    """Four ways through a layer; forward alone without ``grad``."""

    def make(name: str) -> Side:
        layer = {FUSED: lambda: fused, COMPILE: lambda: compiled(eager)}.get(name, lambda: eager)()
        own = {
            key: _in_layout(t.detach(), name).requires_grad_(grad is not None) for key, t in inputs.items()
        }
        of_output = None if grad is None else _in_layout(grad, name)
        return Side(lambda: _step(layer, own, of_output), lambda: _observe(layer, own, of_output))

    wide = {name: t.double().requires_grad_(grad is not None) for name, t in inputs.items()}
    expected = _observe(eager, wide, None if grad is None else grad.double())
    sides = {name: functools.partial(make, name) for name in SIDES}
    return Case(sides, expected, inputs["x"].shape, inputs["x"].dtype, work, op)


def _in_layout(t: Tensor, side: str) -> Tensor:
    return t.contiguous(memory_format=LAYOUTS[side]) if t.dim() == 4 else t


def _step(layer: Layer, inputs: Inputs, grad: Tensor | None) -> Any:
    with torch.set_grad_enabled(grad is not None):
        out = layer(inputs)
    return out if grad is None else torch.autograd.grad(out, list(inputs.values()), grad)


def _observe(layer: Layer, inputs: Inputs, grad: Tensor | None) -> tuple[Inputs, Inputs]:
    with torch.set_grad_enabled(grad is not None):
        out = layer(inputs)
    if grad is None:
        return {"out": out}, {}
    gradients = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach()}, dict(zip(inputs, gradients, strict=True))


def title(op: str, layer: object, backward: bool, dtype: torch.dtype) -> str:
    way = "forward+backward" if backward else "forward"
    return f"{op} {layer}, {BITS[dtype]}, batch {BATCH}, {way}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@each_side
@each_dtype
def test_bn_act(norm: Norm, dtype: torch.dtype, backward: bool, side: str, measure, device) -> None:
    def fused(t: Inputs) -> Tensor:
        settings: dict[str, Any] = {"residual": t.get("residual"), "relu": norm.relu, "eps": EPS}
        return functional.bn_act(t["x"], t["weight"], t["bias"], None, None, training=True, **settings)

    def eager(t: Inputs) -> Tensor:
        out = F.batch_norm(t["x"], None, None, t["weight"], t["bias"], training=True, eps=EPS)
        if "residual" in t:
            out += t["residual"]
        return F.relu_(out) if norm.relu else out

    def make() -> Case:
        shape, vector = (BATCH, norm.channels, norm.height, norm.width), (norm.channels,)
        full = {"x": shape} | ({"residual": shape} if norm.residual else {})
        inputs, grad = random(full | {"weight": vector, "bias": vector}, shape, dtype, device)
        names = ("x", "residual", "z", "grad", "du", "dx")
        sizes = traffic.activations(norm.values(BATCH), name_of(dtype), *names)
        shortcut = "plain" if norm.residual else "none"
        work = [traffic.moved("bn_stats", "none", sizes), traffic.moved("bn_act", shortcut, sizes)]
        if backward:
            ops = ("bn_act_backward_reduce", "bn_act_backward_apply")
            work += [traffic.moved(op, shortcut, sizes) for op in ops]
        return case(fused, eager, inputs, grad if backward else None, work)

    measure(title("bn_act", norm, backward, dtype), side, make)


@each_side
@each_dtype
def test_conv_bn_act(conv: Conv, dtype: torch.dtype, backward: bool, side: str, measure, device) -> None:
    def fused(t: Inputs) -> Tensor:
        norm = BatchNorm(t["gamma"], t["beta"], None, None, training=True, eps=EPS)
        return functional.conv_bn_act(t["x"], ConvNorm(t["weight"], norm, conv.stride))

    def eager(t: Inputs) -> Tensor:
        y = F.conv2d(t["x"], t["weight"], stride=conv.stride, padding=conv.size // 2)
        return F.relu_(F.batch_norm(y, None, None, t["gamma"], t["beta"], training=True, eps=EPS))

    def make() -> Case:
        planned = conv.planned(BATCH)
        shapes = {
            "x": (BATCH, conv.inputs, conv.height, conv.width),
            "weight": (conv.outputs, conv.inputs, conv.size, conv.size),
            "gamma": (conv.outputs,),
            "beta": (conv.outputs,),
        }
        inputs, grad = random(shapes, planned.out_shape, dtype, device)
        inputs["weight"] *= (conv.inputs * conv.size**2) ** -0.5
        sizes, flop = traffic.around(planned, name_of(dtype)), traffic.flop(planned)
        of_norm = {"x": sizes["y"], "z": sizes["z"], "grad": sizes["du"]}
        work = [traffic.moved("conv_fwd", "first", sizes, flop), traffic.moved("bn_act", "none", of_norm)]
        if backward:
            work += [
                traffic.moved("bn_act_backward_reduce", "none", of_norm),
                traffic.moved("conv_wgrad", "first", sizes, flop),
                traffic.moved("conv_dgrad", "projection", sizes, flop),
            ]
        return case(fused, eager, inputs, grad if backward else None, work)

    measure(title("conv_bn_act", conv, backward, dtype), side, make)


@each_side
@each_dtype
def test_bn_relu_maxpool(dtype: torch.dtype, backward: bool, side: str, measure, device) -> None:
    def fused(t: Inputs) -> Tensor:
        return functional.bn_relu_maxpool(t["x"], t["weight"], t["bias"], None, None, training=True, eps=EPS)

    def eager(t: Inputs) -> Tensor:
        out = F.batch_norm(t["x"], None, None, t["weight"], t["bias"], training=True, eps=EPS)
        return F.max_pool2d(F.relu_(out), 3, 2, 1)

    def make() -> Case:
        vector, pooled = (STEM[1],), (*STEM[:2], STEM[2] // 2, STEM[3] // 2)
        inputs, grad = random({"x": STEM, "weight": vector, "bias": vector}, pooled, dtype, device)
        sizes = traffic.activations(inputs["x"].numel(), name_of(dtype), "x", "dx")
        sizes |= traffic.pooled(STEM, name_of(dtype))
        ops = ["bn_stats", "bn_relu_maxpool"]
        if backward:
            ops += ["bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward_apply"]
        work = [traffic.moved(op, "none", sizes) for op in ops]
        return case(fused, eager, inputs, grad if backward else None, work, "bn_relu_maxpool")

    measure(title("bn_relu_maxpool", "x".join(map(str, STEM[1:])), backward, dtype), side, make)


@each_side
@each_dtype
def test_bias_relu_maxpool(dtype: torch.dtype, side: str, measure, device) -> None:
    """Of a trained net, whose bias is the convolution's."""

    def make() -> Case:
        inputs, _ = random({"x": STEM}, STEM, dtype, device)
        sizes = traffic.activations(inputs["x"].numel(), name_of(dtype), "x")
        work = [traffic.moved("bias_relu_maxpool", "none", sizes | traffic.pooled(STEM, name_of(dtype)))]
        return case(
            lambda t: torch.ops.fusedres.bias_relu_maxpool(t["x"], None),
            lambda t: F.max_pool2d(F.relu(t["x"]), 3, 2, 1),
            inputs,
            None,
            work,
            "bias_relu_maxpool",
        )

    measure(title("bias_relu_maxpool", "x".join(map(str, STEM[1:])), False, dtype), side, make)


@each_side
@each_dtype
@pytest.mark.parametrize("channels", [512, 2048])
def test_global_avg_pool(
    channels: int, dtype: torch.dtype, backward: bool, side: str, measure, device
) -> None:
    def make() -> Case:
        shape = (BATCH, channels, 7, 7)
        inputs, grad = random({"x": shape}, (BATCH, channels, 1, 1), dtype, device)
        sizes = traffic.activations(inputs["x"].numel(), name_of(dtype), "x", "dx")
        sizes |= traffic.activations(BATCH * channels, name_of(dtype), "means", "dmeans")
        ops = ("global_avg_pool", *(["global_avg_pool_backward"] if backward else []))
        return case(
            lambda t: functional.global_avg_pool(t["x"]),
            lambda t: F.adaptive_avg_pool2d(t["x"], 1),
            inputs,
            grad if backward else None,
            [traffic.moved(op, "none", sizes) for op in ops],
            "global_avg_pool",
        )

    measure(title("global_avg_pool", f"{channels}x7x7", backward, dtype), side, make)
