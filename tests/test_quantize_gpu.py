"""8-bit nets on GPU kernels: interpreted here, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from fused_ops import FusedOps
from test_inference import seasoned
from torch import Tensor, nn

import fusedres
from fusedres import autotune
from fusedres.inference import gpu_int8
from fusedres.inference.bound import Bound
from fusedres.inference.layers import ConvBiasAct
from fusedres.inference.prepared import Prepared
from fusedres.inference.quantized import Quantize, QuantizedConv, Scale

INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
# on a CPU without the interpreter: the way by PyTorch's operators
BACKEND = "triton" if INTERPRETED else "cuda"
pytestmark = pytest.mark.usefixtures("without_cuda_convolutions")


def stored(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(memory_format=torch.channels_last)


def conv(
    side: int, stride: int, zeros: tuple[int, int, int], *, residual: bool, **sizes: Any
) -> QuantizedConv:
    settings = {"padding": (side // 2,) * 2, "dilation": (1, 1), "groups": 1, "filters": 32} | sizes
    filters = settings.pop("filters")
    weight = torch.randn(filters, 16 // settings["groups"], side, side)
    weight *= torch.linspace(0.01, 1, filters)[:, None, None, None]
    plain = ConvBiasAct(weight, torch.randn(filters), (stride,) * 2, **settings, relu=zeros[2] == 0)
    scales = [Scale(step, zero) for step, zero in zip((0.02, 0.03, 0.2), zeros, strict=True)]
    return QuantizedConv(plain, scales[0], scales[1] if residual else None, scales[2])


def exact(layer: QuantizedConv, x: Tensor, residual: Tensor | None) -> Tensor:
    """Before rounding, in float64."""
    weight = layer.weight.double() * layer.weight_step.double()[:, None, None, None]
    sizes = (layer.stride, layer.padding, layer.dilation, layer.groups)
    u = (x.double() + 128 - layer.x.zero) * layer.x.step
    u = torch.nn.functional.conv2d(u, weight, layer.bias.double(), *sizes)
    if residual is not None:
        u += (residual.double() + 128 - layer.residual.zero) * layer.residual.step
    return u.relu() if layer.relu else u


def check(layer: QuantizedConv, out: torch.dtype | None, *, converted: bool) -> Bound:
    """A bound layer against the formula: within a rounding, in bfloat16 three of that type on the way."""
    x = stored(2, 16, 9, 7)
    shape = layer(x).shape
    given = (x,) if layer.residual is None else (x, stored(*shape))
    bound = gpu_int8.bind(layer, given, out, Prepared())
    z = bound.run(*given, *bound.constants)
    expected = exact(layer, x, given[1] if len(given) > 1 else None)
    step = 2.0**-8 * 3 * 255 * layer.out.step if converted else 1e-3 * layer.out.step
    if out is None:
        assert z.dtype == torch.int8
        levels = (expected / layer.out.step + layer.out.zero).clamp(0, 255)
        error, step = (z.double() + 128 - levels).abs(), 0.5 + step / layer.out.step
    else:
        assert z.dtype == out
        error = (z.double() - expected).abs()
        step += torch.finfo(out).eps * expected.abs().max().item()
    assert error.max() <= step
    return bound


@pytest.mark.parametrize("out", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("zeros", [(0, 0, 0), (114, 128, 0), (3, 128, 128)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("side", "stride"), [(1, 1), (3, 2), (3, 1)])
def test_a_convolution(side, stride, residual, zeros, out):
    with fusedres.backend(BACKEND), FusedOps() as calls:
        check(conv(side, stride, zeros, residual=residual), out, converted=not INTERPRETED)
    assert calls.names.get("conv_int8", 0) == INTERPRETED


@pytest.mark.parametrize(
    "sizes", [{"groups": 4}, {"dilation": (2, 2), "padding": (2, 2)}, {"padding": (0, 0)}], ids=str
)
def test_shapes_that_no_kernel_is_made_for(sizes):
    layer = conv(3, 1, (114, 128, 0), residual=True, **sizes)
    with fusedres.backend(BACKEND):
        check(layer, None, converted=True)
        bound = gpu_int8.bind(
            layer, (stored(1, 16, 5, 5), stored(*layer(stored(1, 16, 5, 5)).shape)), None, Prepared()
        )
    assert bound.reason == "no kernel of ours for its padding, dilation, groups or stride"


def test_levels_as_they_are_stored():
    """int8 is uint8 less 128, but for ties, and stands for the same value."""
    x = torch.cat([torch.randn(1000) * 5, torch.arange(-40, 40) * 0.05])
    for zero in (0, 3, 128):
        scale = Scale(0.1, zero)
        q, signed = scale.quantize(x), scale.quantize(x, torch.int8)
        tie = ((x / scale.step).frac().abs() - 0.5).abs() < 1e-3
        assert signed.dtype == torch.int8 and tie.sum() < 60
        assert torch.equal(signed[~tie].int() + 128, q[~tie].int())
        assert ((signed.int() + 128 - q)[tie].abs() <= 1).all()
        assert torch.equal(scale.dequantize(q), scale.dequantize((q.int() - 128).to(torch.int8)))


@pytest.mark.parametrize("fused", [True, False])
def test_only_what_is_chosen_is_made(fused, monkeypatch):
    """A measurement's answer, as on a GPU; weights in floating point aren't kept for nothing."""
    asked = []

    def answer(op: str, x: Tensor, shape: Any, run: Any) -> bool:
        asked.append((op, x.dtype, shape.filters, shape.residual))
        return fused

    monkeypatch.setattr(autotune, "fused", answer)
    layer, prepared = conv(3, 1, (0, 0, 0), residual=True), Prepared()
    bound = gpu_int8.bind(layer, (stored(1, 16, 5, 5), stored(1, 32, 5, 5)), None, prepared)
    assert asked[0] == ("conv_int8", torch.int8, 32, True)
    assert (bound.implementation == "triton") == fused
    assert any(isinstance(made, ConvBiasAct) for made in prepared._made.values()) != fused


def logits(net: nn.Module, x: Tensor, backend: str) -> Tensor:
    with fusedres.backend(backend):
        return net(x)


NETS = {
    "resnet18, shortcuts A": (lambda: fusedres.ResNet18(num_classes=10, shortcut="A"), (2, 3, 33, 47), 16),
    "resnet50": (lambda: fusedres.resnet50(num_classes=10), (1, 3, 32, 32), 52),
}


@INTERPRETER
@pytest.mark.parametrize("name", NETS)
def test_every_convolution_by_our_kernel(name):
    """A whole net but its stem in 8 bits, against the formulas, the CPU's own and the net before."""
    make, shape, convolutions = NETS[name]
    model = seasoned(make())
    quantised = fusedres.quantize_for_inference(model, torch.randn(4, *shape[1:]), torch.float32)
    x = torch.randn(shape)
    with FusedOps() as calls:
        out = logits(quantised, x, "triton")
    assert calls.names == {"stem_conv": 1, "quantize_int8": 1, "conv_int8": convolutions}
    expected = model(x)
    # the last one isn't rounded to levels; elsewhere a few fall to the other side of a rounding
    assert (out - logits(quantised, x, "reference")).norm() < 0.02 * expected.norm()
    assert (out - logits(quantised, x, "auto")).norm() < 0.02 * expected.norm()
    assert (out - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("settings", [{}, {"zeros": "split"}, {"shortcut": "B"}], ids=str)
def test_nets_by_pytorchs_operators(settings):
    """What a GPU runs where floating point is faster; levels are padded and strided as they are stored."""
    model = seasoned(fusedres.CifarResNet(14, **settings))
    x = torch.randn(16, 3, 32, 32)
    quantised = fusedres.quantize_for_inference(model, x, torch.float32)
    expected = model(x)
    assert (logits(quantised, x, "cuda") - expected).norm() < 0.1 * expected.norm()
    assert logits(quantised, x[:0], "cuda").shape == (0, 10)
    with fusedres.backend("cuda"):
        choices = {choice.layer: choice for choice in quantised.choices(x)}
    kinds = {name: type(quantised.net.get_submodule(name)) for name in choices if name}
    assert sum(kind is QuantizedConv for kind in kinds.values()) > 10
    ends = [choices[name].reason for name, kind in kinds.items() if issubclass(kind, Quantize)]
    assert ends[-1] == "nothing to convert"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_on_a_gpu(name):
    """Measured, forced, and in a CUDA graph, against the formulas on the CPU."""
    model = seasoned(getattr(fusedres, name)(num_classes=10))
    x = torch.randn(8, 3, 96, 64)
    quantised = fusedres.quantize_for_inference(model, x, torch.bfloat16)
    expected = logits(quantised, x, "reference")
    on_gpu = quantised.to("cuda")
    for backend in ("auto", "triton"):
        for _ in range(2):
            out = logits(on_gpu, x.cuda(), backend).cpu()
            assert (out - expected).norm() < 0.03 * expected.norm()
