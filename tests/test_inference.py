"""A trained net made for inference: the same logits, from any ResNet, in one pass a convolution."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from cifar_data import images, trained
from tolerances import assert_close_to_reference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.inference import OptimizedResNet, onednn
from fusedres.inference.layers import ConvBiasAct

DTYPES = [torch.float32, torch.bfloat16]
EXPORTED_OPS = {"aten", "_operator"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def seasoned(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something and a net whose values stay tame."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            last = name.endswith(("bn2", "bn3"))
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data *= 0.3 if last else 1.0
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return seasoned(fusedres.resnet18(num_classes=10))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 64, 48)


def torchvision_model(name: str, **settings: object) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return seasoned(getattr(models, name)(**settings))


@torch.no_grad()
def check(model: nn.Module, x: Tensor, dtype: torch.dtype, optimised: nn.Module | None = None) -> None:
    """The optimised model against ``model`` in float64, by ``model``'s own error in ``dtype``."""
    optimised = optimised or fusedres.optimize_for_inference(model, dtype)
    with fusedres.backend("reference"):
        reference = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).to(dtype)(x.to(dtype))
    ours = optimised(x)
    assert ours.dtype == x.dtype
    assert_close_to_reference(ours.to(dtype), eager, reference, name="logits")


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["v1.5", "v1"])
@pytest.mark.parametrize("name", RESNETS)
def test_logits(name, variant, dtype):
    model = seasoned(getattr(fusedres, name)(variant=variant, num_classes=100))
    check(model, torch.randn(2, 3, 64, 64), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 47), (5, 64, 31), (33, 32, 40), (7, 1, 1), (2, 225, 223)])
def test_any_size_in_any_layout(resnet18, shape, dtype):
    n, height, width = shape
    optimised = fusedres.optimize_for_inference(resnet18, dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        check(resnet18, torch.randn(n, 3, height, width).to(memory_format=layout), dtype, optimised)
    wide = torch.randn(n, 3, height, 2 * width)[..., ::2]
    check(resnet18, wide, dtype, optimised)


def test_from_1_to_33_images(resnet18):
    """In parts, the images are what they are alone, and in order."""
    optimised = fusedres.optimize_for_inference(resnet18)
    x = torch.randn(33, 3, 224, 224)
    assert optimised._part(x) < 33
    alone = torch.cat([optimised(image) for image in x.split(1)])
    for n in (1, 2, 8, 15, 16, 17, 33):
        torch.testing.assert_close(optimised(x[:n]), alone[:n], rtol=1e-4, atol=1e-4)


def test_no_images(resnet18):
    assert fusedres.optimize_for_inference(resnet18)(torch.empty(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_models_of_torchvision(name, dtype, x):
    check(torchvision_model(name), x, dtype)


def test_frozen_batch_norm(x):
    ops = pytest.importorskip("torchvision.ops")
    check(torchvision_model("resnet18", norm_layer=ops.FrozenBatchNorm2d), x, torch.float32)


def test_dilation(x):
    check(torchvision_model("resnet50", replace_stride_with_dilation=(False, True, True)), x, torch.float32)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "seresnet50", "resnetaa50"])
def test_models_of_timm(name):
    """Also those with other stems, shortcuts and parts that no convolution takes in."""
    model = seasoned(pytest.importorskip("timm").create_model(name, pretrained=False))
    check(model, torch.randn(2, 3, 64, 64), torch.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"zeros": "split"}, {"shortcut": "B"}, {"shortcut": "C"}, {"plain": True}],
    ids=lambda s: str(*s.items()),
)
def test_cifar_nets(settings):
    check(seasoned(fusedres.CifarResNet(20, **settings)), torch.randn(5, 3, 32, 32), torch.float32)


def test_biases_weightless_norms_and_other_norms(x):
    """A convolution's own bias, a batch norm without parameters, and one that isn't a batch norm."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels) if channels == 256 else nn.BatchNorm2d(channels, affine=False)

    model = fusedres.resnet18(num_classes=10, norm_layer=norm)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
    model.maxpool = nn.MaxPool2d(2)
    check(model.eval(), x, torch.float32)


def test_dropout_does_nothing(resnet18, x):
    model = copy.deepcopy(resnet18)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    check(model.eval(), x, torch.float32)


@pytest.mark.skipif(bool(onednn.unavailable(torch.float32)), reason="needs oneDNN")
@pytest.mark.parametrize(("name", "convolutions", "blocks"), [("resnet18", 20, 8), ("resnet50", 53, 16)])
def test_one_pass_a_convolution(name, convolutions, blocks, x):
    """Nothing but convolutions touches an activation, and no residual needs memory of its own."""
    model = fusedres.optimize_for_inference(seasoned(getattr(fusedres, name)()), example_input=x)
    with Calls() as calls:
        model(x)
    found = {name.removesuffix(".default"): count for name, count in calls.of.items()}
    assert found.pop("mkldnn._convolution_pointwise_.binary") == blocks
    assert found.pop("mkldnn._convolution_pointwise") == convolutions - blocks
    passes = {"aten.relu", "aten.relu_", "aten.add.Tensor", "aten.add_.Tensor", "aten.native_batch_norm"}
    assert not passes & set(found), found
    assert all(count == 1 for count in found.values()), found


@pytest.mark.skipif(bool(onednn.unavailable(torch.float32)), reason="needs oneDNN")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_on_a_cpu_without_them(dtype, resnet18, x, monkeypatch):
    """The net in float32 with the parameters of 16 bits: PyTorch's convolutions take ten times as long."""
    monkeypatch.setattr(onednn, "unavailable", lambda d: None if d == torch.float32 else f"no {d}")
    optimised = fusedres.optimize_for_inference(resnet18, dtype, x)
    check(resnet18, x, dtype, optimised)
    assert {p.dtype for p in optimised.parameters()} == {dtype}
    assert optimised(x.to(dtype)).dtype == dtype
    with Calls() as calls:
        optimised(x)
    assert not any("aten.conv" in name for name in calls.of), calls.of
    assert all(c.reason.endswith(f"in float32: no {dtype}") for c in optimised.choices(x))

    with torch.no_grad():  # new parameters, not what was made of the old ones
        optimised.net.get_submodule("fc").bias += 1
    moved = copy.deepcopy(resnet18)
    moved.fc.bias.data += 1
    check(moved, x, dtype, optimised)

    with fusedres.backend("reference"):
        assert not any("float32" in c.reason for c in optimised.choices(x))
        given = x.to(dtype, memory_format=torch.channels_last)
        assert torch.equal(optimised(given), optimised.net(given))
    exact = fusedres.optimize_for_inference(resnet18, torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(resnet18).double()(x.double())
    torch.testing.assert_close(exact(x.double()), expected, rtol=1e-12, atol=1e-12)
    assert not any("float32" in c.reason for c in exact.choices(x))


def test_the_model_is_left_alone(resnet18, x):
    before = copy.deepcopy(resnet18.state_dict())
    optimised = fusedres.optimize_for_inference(resnet18, torch.bfloat16, x)
    assert not resnet18.training and resnet18.fc.weight.dtype == torch.float32
    for name, value in resnet18.state_dict().items():
        assert torch.equal(value, before[name]), name
    theirs = {p.data_ptr() for p in resnet18.parameters()}
    assert not theirs & {p.data_ptr() for p in optimised.parameters()}
    assert not any(p.requires_grad for p in optimised.parameters())


def test_modes_do_not_matter(resnet18, x):
    with torch.inference_mode():
        optimised = fusedres.optimize_for_inference(resnet18, example_input=x)
        expected = optimised(x)
    assert torch.equal(optimised(x.clone().requires_grad_()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimised(x), expected)
    fresh = fusedres.optimize_for_inference(resnet18)
    assert torch.equal(fresh(x.clone().requires_grad_()), expected)
    assert not fresh(x).requires_grad


def test_same_bits_twice(resnet18, x):
    optimised = fusedres.optimize_for_inference(resnet18, torch.bfloat16)
    assert torch.equal(optimised(x), optimised(x))


def copies(optimised: OptimizedResNet) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(optimised, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(optimised),
        "pickle": pickle.loads(pickle.dumps(optimised)),
        "save": torch.load(file, weights_only=False),
    }


def test_copies_after_use(resnet18, x):
    optimised = fusedres.optimize_for_inference(resnet18, example_input=x)
    expected = optimised(x)
    for name, model in copies(optimised).items():
        assert torch.equal(model(x), expected), name
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in optimised.parameters()}


def test_state_dict(resnet18, x):
    other = seasoned(fusedres.resnet18(num_classes=10))
    optimised = fusedres.optimize_for_inference(resnet18, example_input=x)
    replacing = fusedres.optimize_for_inference(other, example_input=x)
    for assign in (False, True):
        model = copy.deepcopy(optimised)
        model(x)
        model.load_state_dict(replacing.state_dict(), assign=assign)
        assert torch.equal(model(x), replacing(x))
    assert "net.layer1.0.conv1.bias" in optimised.state_dict()
    assert len(optimised.state_dict()) == 2 * 20 + 2


def test_a_parameter_changed_in_place_is_seen(resnet18, x):
    optimised = fusedres.optimize_for_inference(resnet18, example_input=x)
    before = optimised(x)
    with torch.no_grad():
        optimised.net.conv1.weight.mul_(2)
    assert not torch.equal(optimised(x), before)


def test_another_dtype_later(resnet18, x):
    optimised = fusedres.optimize_for_inference(resnet18, example_input=x)
    check(resnet18, x, torch.bfloat16, optimised.to(torch.bfloat16))


def test_many_threads(resnet18):
    """100 at once, on sizes that nobody has prepared."""
    optimised = fusedres.optimize_for_inference(resnet18)
    inputs = [torch.randn(1 + i % 3, 3, 32 + 16 * (i % 4), 48) for i in range(100)]
    outputs: list[Tensor | None] = [None] * len(inputs)

    def call(index: int) -> None:
        outputs[index] = optimised(inputs[index])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for given, out in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(out, resnet18(given), rtol=1e-3, atol=1e-4)


def test_programs_are_bounded(resnet18, monkeypatch):
    monkeypatch.setattr("fusedres.inference.model.PROGRAMS", 3)
    optimised = fusedres.optimize_for_inference(resnet18)
    for size in (32, 33, 34, 32, 35):
        optimised(torch.randn(1, 3, size, size))
    assert [shape[2] for shape, *_ in optimised._programs] == [34, 32, 35]  # 33 wasn't used for longest


EXPORTED = """
import sys, torch
model, x, expected, more = torch.load(sys.argv[1] + "/data.pt")
loaded = torch.export.load(sys.argv[1] + "/model.pt2").module()
assert (loaded(x) - expected).norm() <= float(sys.argv[2]) * expected.norm()
assert loaded(more).shape == (7, 10)
assert not any(name.split(".")[0] == "fusedres" for name in sys.modules)
"""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_export(resnet18, x, dtype, tmp_path):
    """A graph of ATen's operators alone, which a process without this package loads and runs."""
    optimised = fusedres.optimize_for_inference(resnet18, dtype, x)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(optimised, (x,), dynamic_shapes=({0: batch},))
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert called and all(target.namespace == "aten" for target in called)
    torch.export.save(exported, tmp_path / "model.pt2")
    with fusedres.backend("reference"):
        expected = optimised(x)
    torch.save((None, x, expected, torch.randn(7, 3, 64, 48)), tmp_path / "data.pt")
    script = tmp_path / "load.py"
    script.write_text(EXPORTED)
    result = subprocess.run(
        [sys.executable, script, tmp_path, str(torch.finfo(dtype).eps * 4)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("depth", [20, 56])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trained_weights_on_the_test_images(data, depth, dtype):
    expected = {20: 9_173, 56: 9_339}[depth]
    model = fusedres.CifarResNet(depth, zeros="split").eval()
    model.load_state_dict(trained(data, depth))
    optimised = fusedres.optimize_for_inference(model, dtype)
    x, labels = images(data, "cifar10_test.npz")
    correct = sum(
        int((optimised(batch).argmax(1) == target).sum())
        for batch, target in zip(x.split(500), labels.split(500), strict=True)
    )
    assert correct == expected if dtype == torch.float32 else abs(correct - expected) <= 15


def hooked(model: nn.Module) -> nn.Module:
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda m: m.train(),
            ValueError,
            r"in eval mode, the model is in training mode: call model.eval\(\)",
        ),
        (lambda m: m.layer2.train() and m, ValueError, "in eval mode, layer2 is in training mode"),
        (
            lambda m: fusedres.resnet18(norm_layer=_without_statistics).eval(),
            ValueError,
            "bn1 has no running statistics",
        ),
        (hooked, ValueError, "layer1.0.conv1 has a hook, which an optimised model would not run"),
        (lambda m: nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), TypeError, "a ResNet of .*, got Sequential"),
        (lambda m: nn.DataParallel(m), TypeError, r"its \.module\), got DataParallel"),
        (lambda m: fusedres.optimize_for_inference(m), TypeError, "optimised already"),
        (lambda m: m.state_dict(), TypeError, "a ResNet of .*, got OrderedDict"),
    ],
)
def test_models_that_are_refused(resnet18, make, error, message):
    with pytest.raises(error, match=message):
        fusedres.optimize_for_inference(make(copy.deepcopy(resnet18)))


def _without_statistics(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.int8}, r"dtype must be None or one of torch\.float32, .*, got torch\.int8"),
        ({"dtype": "bf16"}, "dtype must be None or one of .*, got 'bf16'"),
        ({"cuda_graph": "always"}, "cuda_graph must be True, False or 'auto', got 'always'"),
    ],
)
def test_wrong_arguments(resnet18, settings, message):
    with pytest.raises(ValueError, match=message):
        fusedres.optimize_for_inference(resnet18, **settings)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            TypeError,
            "x must be torch.float32 .*, got torch.uint8",
        ),
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.float64),
            TypeError,
            "or torch.bfloat16, got torch.float64: conv",
        ),
        (torch.zeros(3, 8, 8), ValueError, r"x must be \[N, 3, H, W\], got \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"x must be \[N, 3, H, W\], got \[1, 1, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "x must be on cpu, .*, got meta: move one"),
        ([1, 2], TypeError, "x must be a tensor, got list"),
    ],
)
def test_inputs_that_are_refused(resnet18, given, error, message):
    optimised = fusedres.optimize_for_inference(resnet18, torch.bfloat16)
    with pytest.raises(error, match=message):
        optimised(given)
    assert optimised(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_is_not_trained(resnet18):
    optimised = fusedres.optimize_for_inference(resnet18)
    assert optimised.eval() is optimised
    with pytest.raises(RuntimeError, match="can't be trained"):
        optimised.train()


def test_every_batch_norm_is_folded(resnet18):
    optimised = fusedres.optimize_for_inference(resnet18)
    kinds = Counter(type(m) for m in optimised.modules() if not list(m.children()))
    assert kinds[nn.BatchNorm2d] == 0 and kinds[nn.ReLU] == 0
    assert sum(isinstance(m, ConvBiasAct) for m in optimised.modules()) == 20


def test_explain(resnet18):
    optimised = fusedres.optimize_for_inference(resnet18)
    steps = {step.layer: step for step in fusedres.explain(optimised, (2, 3, 64, 64)) if step.layer}
    assert len(steps) == 20 + 2  # with avgpool and fc
    last = steps["layer1.0.conv2"]
    assert last.op == "conv + bias + ReLU + residual" and last.shape == (2, 64, 16, 16)
    assert steps["conv1"].op == "conv + bias + ReLU + max pool"
    expected = "aten" if onednn.unavailable(torch.float32) else "onednn"
    assert {steps[name].implementation for name in steps if "conv" in name} == {expected}
    with fusedres.backend("reference"):
        assert {s.implementation for s in fusedres.explain(optimised, (2, 3, 64, 64))} == {"aten"}
    with pytest.raises(
        ValueError, match="an optimised model runs in torch.float32 on cpu, got torch.bfloat16"
    ):
        fusedres.explain(optimised, (2, 3, 64, 64), torch.bfloat16)


def test_operators_that_read_one_value_twice():
    """Of a net that is traced, not guessed."""

    class Doubled(fusedres.ResNet18):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cat([y + y, y.mul(2)], dim=1)

    check(seasoned(Doubled(num_classes=10)), torch.randn(2, 3, 32, 32), torch.float32)
