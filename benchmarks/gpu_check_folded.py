"""The part for a trained net: ResNet-50's convolutions with bias, and whole blocks, beside cuDNN's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_check_cases import Inputs, Outputs, _activation, _batch, _wide
from gpu_check_conv_cases import Call, Layer, block_layers
from gpu_check_convs import any_installed, measure
from gpu_check_ops import Timer, copy_gbps
from gpu_check_run import Check
from shapes import IMAGE_SIZE
from torch import Tensor

from fusedres import plan
from fusedres.inference import gpu
from fusedres.inference.layers import ConvBiasAct
from fusedres.inference.prepared import Prepared
from fusedres.plan import traffic
from fusedres.plan.conv import WHOLE_BLOCK_INNER

_OPS = torch.ops.fusedres
_TINY_IMAGE = 32
_OTHER_DTYPES = 2  # convolutions that are measured in fp16 and fp32, too
_ENOUGH = 1.0  # seconds, for one


class Folded(NamedTuple):
    """A convolution of a trained net, or a block from its 3x3.

    Args:
        conv: its shape for one image; a block has as many filters as its 3x3.
        relu: whether a ReLU follows.
        block: whether it is one.
    """

    conv: plan.Conv
    relu: bool = True
    block: bool = False

    def __str__(self) -> str:
        _, c, h, w, filters, side, stride, *_ = self.conv
        if self.block:
            return f"block {c}x{h}x{w}, {filters} inside"
        return f"{side}x{side}/{stride} {c}x{h}x{w} -> {filters}" + " + residual" * self.conv.residual


def folded(check: Check) -> None:
    """A gate for each kernel, then its time beside cuDNN's convolution, alone and with what it can add."""
    if not any_installed(check):
        return
    timer = Timer(check)
    gbps, _ = copy_gbps(check, timer)
    batch = _batch(check.device, check.tiny)
    torch.manual_seed(0)
    found = cases(_TINY_IMAGE if check.tiny else IMAGE_SIZE)
    remaining = _plan(found)
    while remaining and check.left() > (0 if check.tiny else _ENOUGH):
        case, dtype = remaining.pop(0)
        facts = {"variant": str(case), "count": found[case], "batch": batch}
        measure(check, call_of(case, batch, check.device, dtype), dtype, facts, timer, gbps)
    if remaining:
        check.record("out of time", layers_left=len(remaining))


def cases(image_size: int) -> Counter[Folded]:
    """ResNet-50's distinct convolutions and blocks, and how many there are of each."""
    found: Counter[Folded] = Counter()
    for layer, count in block_layers("resnet50", image_size).items():
        # the last of a block is the 1x1 behind a norm
        last = layer.inner and layer.conv.size == 1
        conv = layer.planned(1)._replace(pending=False, residual=last)
        found[Folded(conv, relu=layer.place != "projection")] += count
        if _begins_a_block(layer):
            found[Folded(conv._replace(side=3, residual=True), block=True)] += count
    return found


def _begins_a_block(layer: Layer) -> bool:
    """Whether the layer is the first of a block that the kernel for whole ones takes."""
    inputs, outputs, _, stride, *_ = layer.conv
    identity = layer.place == "first" and not layer.compact and inputs == 4 * outputs
    return identity and stride == 1 and outputs in WHOLE_BLOCK_INNER


def _plan(found: Counter[Folded]) -> list[tuple[Folded, torch.dtype]]:
    """Blocks and convolutions in bf16, in the order of the net; then some in the other dtypes."""
    blocks, convs = ([case for case in found if case.block == block] for block in (True, False))
    plans = [(case, torch.bfloat16) for case in (*blocks, *convs)]
    plans += [(case, torch.float16) for case in (*blocks, *convs[:_OTHER_DTYPES])]
    return plans + [(case, torch.float32) for case in convs[:_OTHER_DTYPES]]


def call_of(case: Folded, batch: int, device: str, dtype: torch.dtype) -> Call:
    """The op on ``batch`` images, and cuDNN's way, which is the one that the planner holds it against."""
    conv = case.conv._replace(batch=batch)
    return _block(conv, device, dtype) if case.block else _conv(conv, case.relu, device, dtype)


def _conv(conv: plan.Conv, relu: bool, device: str, dtype: torch.dtype) -> Call:
    t = Inputs(x=_image(conv, device, dtype), residual=None)
    t.weight, t.bias = _parameters(conv.channels, conv.filters, conv.side, device, dtype)
    if conv.residual:
        t.residual = _activation(conv.out_shape, dtype, device)
    sizes = traffic.around(conv, _short(dtype))
    sizes["residual"] = sizes["z"]
    moved = traffic.moved("conv_bias_act", "plain" if conv.residual else "none", sizes)

    def run(t: Inputs) -> Outputs:
        return (_OPS.conv_bias_act(t.x, t.weight, t.bias, t.residual, relu, conv.stride),)

    library = _library(t.weight, t.bias, conv.stride, relu, conv.residual)
    tensors = (t.x, t.residual) if conv.residual else (t.x,)
    return _call(
        "conv_bias_act",
        conv,
        moved.bytes,
        traffic.flop(conv),
        t,
        run,
        plain=lambda: F.conv2d(t.x, t.weight, None, conv.stride, conv.side // 2),
        composed=lambda: (library(*tensors),),
    )


def _block(conv: plan.Conv, device: str, dtype: torch.dtype) -> Call:
    inner, outer, positions = conv.filters, conv.channels, conv.batch * conv.height * conv.width
    shapes = ((outer, inner, 1), (inner, inner, 3), (inner, outer, 1))
    t = Inputs(x=_image(conv, device, dtype))
    made = [_parameters(*shape, device, dtype) for shape in shapes]
    (t.weight1, t.bias1), (t.weight2, t.bias2), (t.weight3, t.bias3) = made
    size = dtype.itemsize
    sizes = traffic.activations(positions * outer, _short(dtype), "x", "z")
    sizes |= {f"weight{i}": traffic.Full(f"weight{i}", w.numel(), size) for i, (w, _) in enumerate(made, 1)}
    moved = traffic.moved("bottleneck_infer", "none", sizes)

    def run(t: Inputs) -> Outputs:
        return (_OPS.bottleneck_infer(t.x, t.weight1, t.bias1, t.weight2, t.bias2, t.weight3, t.bias3),)

    first, second, third = (_library(w, b, 1, True, i == 2) for i, (w, b) in enumerate(made))

    def plain() -> Tensor:
        y = t.x
        for weight, _ in made:
            y = F.conv2d(y, weight, None, 1, weight.shape[2] // 2)
        return y

    flop = 2 * positions * sum(weight.numel() for weight, _ in made)
    return _call(
        "bottleneck_infer",
        conv,
        moved.bytes,
        flop,
        t,
        run,
        plain=plain,
        composed=lambda: (third(second(first(t.x)), t.x),),
    )


def _call(
    op: str,
    conv: plan.Conv,
    moved: int,
    flop: int,
    t: Inputs,
    run: Callable[[Inputs], Outputs],
    **more: Any,
) -> Call:
    # 16 bits: the reference computes in float32, and rounds where the kernels do
    wide = _wide(t) if t.x.dtype == torch.float32 else t
    return Call(op, conv, moved, flop, run=lambda: run(t), expected=lambda: run(wide)[0], **more)


def _image(conv: plan.Conv, device: str, dtype: torch.dtype) -> Tensor:
    return _activation((conv.batch, conv.channels, conv.height, conv.width), dtype, device, mean=0.5)


def _parameters(
    channels: int, filters: int, side: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A weight, and the bias in float32."""
    weight = torch.randn(filters, channels, side, side, device=device) / (channels * side**2) ** 0.5
    return weight.to(dtype, memory_format=torch.channels_last), torch.randn(filters, device=device)


def _library(weight: Tensor, bias: Tensor, stride: int, relu: bool, residual: bool) -> Callable[..., Tensor]:
    padding = weight.shape[2] // 2
    layer = ConvBiasAct(
        weight, bias.to(weight.dtype), (stride, stride), (padding, padding), (1, 1), 1, relu=relu
    )
    bound = gpu.library(layer, residual, Prepared())
    return lambda *tensors: bound.run(*tensors, *bound.constants)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
