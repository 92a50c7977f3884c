"""8-bit convolutions: exact against their formula, and trained nets that stay right on real images."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from cifar_data import images, trained
from test_inference import EXPORTED_OPS, seasoned
from torch import Tensor, nn

import fusedres
from fusedres.inference import onednn
from fusedres.inference.bound import Bound
from fusedres.inference.calibrate import Range
from fusedres.inference.layers import ConvBiasAct
from fusedres.inference.prepared import Prepared
from fusedres.inference.program import Program
from fusedres.inference.quantized import LEVELS, Dequantize, Quantize, QuantizedConv, Scale

needs_vnni = pytest.mark.skipif(bool(onednn.quantized_unavailable()), reason="needs VNNI")


def levels(*shape: int) -> Tensor:
    return torch.randint(0, LEVELS + 1, shape, dtype=torch.uint8).to(memory_format=torch.channels_last)


@needs_vnni
@pytest.mark.parametrize("way", ["int8", "float32", "bfloat16"])
@pytest.mark.parametrize("zeros", [(0, 0, 0), (114, 128, 0), (3, 128, 128)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("settings", [(1, 1, 0, 1, 1), (3, 2, 1, 1, 1), (3, 1, 2, 2, 1), (3, 1, 1, 1, 4)])
def test_a_convolution(settings, residual, zeros, way, monkeypatch):
    """oneDNN's and the converted one against the module's formula in float64."""
    side, stride, padding, dilation, groups = settings
    if way == "float32":
        monkeypatch.setattr(onednn, "unavailable", lambda d: "no" if d == torch.bfloat16 else None)
    elif way == "bfloat16" and onednn.unavailable(torch.bfloat16):
        pytest.skip("needs bfloat16")
    weight = torch.randn(24, 16 // groups, side, side) * torch.linspace(0.01, 1, 24)[:, None, None, None]
    relu = zeros[2] == 0
    plain = ConvBiasAct(
        weight, torch.randn(24), (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups, relu=relu
    )
    x = levels(3, 16, 11, 9)
    scales = [Scale(step, zero) for step, zero in zip((0.02, 0.03, 0.2), zeros, strict=True)]
    layer = QuantizedConv(plain, scales[0], scales[1] if residual else None, scales[2])
    expected = layer(x)
    given = (x, levels(*expected.shape)) if residual else (x,)
    prepared = Prepared()
    bound = onednn.quantized_candidates(layer, x, prepared, residual=residual, reuse=False)[way]
    kept = [t.clone() for t in given]
    out = bound.run(*given, *bound.constants)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))

    exact = torch.nn.functional.conv2d(
        (x.double() - zeros[0]) * scales[0].step,
        layer.weight.double() * layer.weight_step.double()[:, None, None, None],
        layer.bias.double(),
        *(stride, padding, dilation, groups),
    )
    if residual:
        exact += (given[1].double() - zeros[1]) * scales[1].step
    exact = (exact.relu() if relu else exact) / scales[2].step + zeros[2]
    exact = exact.clamp(0, LEVELS)
    # a rounding away from the exact value; in bfloat16 three of that type on the way
    allowed = 0.5 + (1e-3 if way != "bfloat16" else 3 * 2.0**-8 * LEVELS)
    assert (out.double() - exact).abs().max() <= allowed
    assert (layer(*given).double() - exact).abs().max() <= 0.5 + 1e-3


def test_scales_lose_least():
    """Against every threshold by brute force; 0 is a level; the few largest values are cut off."""
    x = torch.randn(200_000).relu().square()
    seen = Range()
    seen.see(x)
    seen.count(x)
    scale = seen.scale()
    assert scale.zero == 0 and scale.step * LEVELS < 0.95 * x.max()

    def loss(step: float) -> float:
        s = Scale(step, 0)
        return (s.dequantize(s.quantize(x)) - x).square().sum().item()

    best = min(loss(t * x.max().item() / LEVELS) for t in torch.linspace(0.2, 1, 200).tolist())
    assert loss(scale.step) <= 1.02 * best

    both = Range()
    both.see(x - 1)
    both.count(x - 1)
    signed = both.scale()
    assert 0 < signed.zero < LEVELS
    assert signed.dequantize(signed.quantize(torch.zeros(1))) == 0


def test_an_activation_that_is_always_zero():
    dead = Range()
    dead.see(torch.zeros(4))
    dead.count(torch.zeros(4))
    scale = dead.scale()
    assert scale.dequantize(scale.quantize(torch.zeros(3))).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 3, 64, 64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return seasoned(fusedres.resnet18(num_classes=10))


@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 20), ("resnet50", 53)])
def test_what_is_quantised(name, convolutions, calibration):
    """Every convolution but the first, with one conversion at either end."""
    quantised = fusedres.quantize_for_inference(seasoned(getattr(fusedres, name)()), calibration)
    kinds = [type(m) for m in quantised.modules()]
    assert kinds.count(QuantizedConv) == convolutions - 1
    assert kinds.count(Quantize) == kinds.count(Dequantize) == 1
    assert all(m.weight.dtype == torch.int8 for m in quantised.modules() if isinstance(m, QuantizedConv))
    size = sum(t.numel() * t.itemsize for t in quantised.state_dict().values())
    assert size < 0.35 * sum(p.numel() * p.itemsize for p in getattr(fusedres, name)().parameters())


@pytest.mark.parametrize("size", [(32, 32), (33, 21)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"zeros": "split"}, {"shortcut": "B"}, {"plain": True}], ids=str)
def test_shortcuts_stay_in_8_bits(settings, size):
    net = seasoned(fusedres.CifarResNet(14, **settings))
    x = torch.randn(16, 3, *size)
    quantised = fusedres.quantize_for_inference(net, x.split(5), torch.float32)
    kinds = [type(m) for m in quantised.modules()]
    assert kinds.count(Quantize) == kinds.count(Dequantize) == 1
    out, expected = quantised(x), net(x)
    assert (out - expected).norm() < 0.1 * expected.norm()


def test_padding_with_another_value_leaves_8_bits():
    """Only zeros have the same level wherever they are."""

    class Padded(fusedres.CifarResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = nn.functional.pad(self.layer1(x), (1, 1, 1, 1), value=0.7)
            return self.fc(self.layer3(self.layer2(x)).mean((2, 3)))

    net = seasoned(Padded(8))
    x = torch.randn(16, 3, 16, 16)
    quantised = fusedres.quantize_for_inference(net, x, torch.float32)
    assert [type(m) for m in quantised.modules()].count(Dequantize) == 2
    assert (quantised(x) - net(x)).norm() < 0.1 * net(x).norm()


@pytest.mark.parametrize("dtype", [torch.float32, None], ids=str)
def test_the_program_is_the_module(model, calibration, dtype):
    """What runs on this machine against the formulas, in a whole net."""
    quantised = fusedres.quantize_for_inference(model, calibration, dtype)
    x = torch.randn(3, 3, 64, 48)
    out = quantised(x)
    with fusedres.backend("reference"):
        plain = quantised(x)
    expected = model(x)
    # a level here and there falls to the other side of a rounding
    assert (out - plain).norm() < 0.02 * expected.norm()
    assert (out - expected).norm() < 0.1 * expected.norm()


@needs_vnni
def test_both_ways_are_measured(model, calibration):
    quantised = fusedres.quantize_for_inference(model, calibration)
    quantised(calibration)
    ((shape, measured),) = quantised.measured.items()
    assert shape == calibration.shape and len(measured) == 19
    assert all("int8" in took and len(took) == 2 for took in measured.values())


def test_the_faster_way_is_taken(model):
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x

    program = Program(torch.fx.symbolic_trace(nn.Identity()), Prepared())
    ways = {"slow": Bound(slow), "fast": Bound(torch.neg)}
    assert program._fastest("layer", ways, [torch.ones(3)]).run is torch.neg
    assert program.measured["layer"]["slow"] > 10 > program.measured["layer"]["fast"]
    torch.use_deterministic_algorithms(True)
    try:
        assert program._fastest("layer", ways, [torch.ones(3)]).run is slow
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_vnni(model, calibration, monkeypatch):
    """Sums that could overflow are not made: convolutions run in floating point."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    quantised = fusedres.quantize_for_inference(model, calibration, torch.float32)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert (quantised(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("depth", [20, 56])
def test_trained_weights_on_the_test_images(data, depth):
    expected = {20: 9_173, 56: 9_339}[depth]
    net = fusedres.CifarResNet(depth, zeros="split").eval()
    net.load_state_dict(trained(data, depth))
    seen, _ = images(data, "cifar10_train_first10k.npz")
    quantised = fusedres.quantize_for_inference(net, seen[:512].split(128))
    x, labels = images(data, "cifar10_test.npz")
    correct = sum(
        int((quantised(batch).argmax(1) == target).sum())
        for batch, target in zip(x.split(500), labels.split(500), strict=True)
    )
    assert abs(correct - expected) <= 30  # 0.3 points


def test_copies_and_moves(model, calibration):
    quantised = fusedres.quantize_for_inference(model, calibration, torch.float32)
    expected = quantised(calibration)
    assert torch.equal(copy.deepcopy(quantised)(calibration), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantised))(calibration), expected)
    again = fusedres.quantize_for_inference(seasoned(fusedres.resnet18(num_classes=10)), calibration)
    with pytest.raises(RuntimeError, match="layer1"):
        again.load_state_dict(model.state_dict())
    half = copy.deepcopy(quantised).to(torch.bfloat16)
    assert (half(calibration) - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(half.to(torch.float32)(calibration), half(calibration))
    for m in half.modules():
        if isinstance(m, QuantizedConv):
            assert m.weight.dtype == torch.int8 and m.bias.dtype == m.weight_step.dtype == torch.float32


def test_export(model, calibration):
    quantised = fusedres.quantize_for_inference(model, calibration, torch.float32)
    exported = torch.export.export(quantised, (calibration,))
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert called and all(target.namespace in EXPORTED_OPS for target in called)
    with fusedres.backend("reference"):
        expected = quantised(calibration)
    assert (exported.module()(calibration) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibration must have at least one image"),
        (torch.zeros(0, 3, 8, 8), "calibration must have at least one image"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "calibration must be floating-point images"),
        ([torch.zeros(3, 8, 8)], "calibration must be floating-point images"),
        (torch.full((1, 3, 8, 8), float("nan")), "calibration has values that are not finite"),
    ],
)
def test_calibration_that_is_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        fusedres.quantize_for_inference(model, given)


def test_models_that_are_refused(model, calibration):
    with pytest.raises(ValueError, match="eval mode"):
        fusedres.quantize_for_inference(copy.deepcopy(model).train(), calibration)
    broken = copy.deepcopy(model)
    broken.layer3[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="model gives values that are not finite"):
        fusedres.quantize_for_inference(broken, calibration)
    with pytest.raises(TypeError, match="a ResNet of"):
        fusedres.quantize_for_inference(nn.Sequential().eval(), calibration)
