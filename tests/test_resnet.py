"""ResNet-18 to 152 against torchvision's: structure, weights, outputs, gradients, statistics."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from fused_ops import FusedOps
from torch import Tensor, nn

import fusedres
from fusedres.models.resnet import ResNet
from fusedres.nn import Bottleneck

CLASSES: dict[str, type[ResNet]] = {
    name: getattr(fusedres, name) for name in ("ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152")
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fusedres.backend(request.param):
        yield request.param


@pytest.fixture
def torchvision() -> Any:
    pytest.importorskip("torchvision")
    return importlib.import_module("torchvision.models")


def twins(models: Any, name: str, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Our network and torchvision's, from one seed, with statistics as after some training."""
    torch.manual_seed(0)
    theirs = getattr(models, name.lower())(**arguments)
    ours = CLASSES[name](**arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            if key.endswith(("running_mean", "bn1.bias", "bn2.bias", "bn3.bias")):
                tensor.normal_(0, 0.1, generator=generator)
            elif key.endswith("running_var"):
                tensor.uniform_(0.8, 1.2, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(size: int = 64, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


def number_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ResNet18", {}, 11_689_512),
        ("ResNet34", {}, 21_797_672),
        ("ResNet50", {}, 25_557_032),
        ("ResNet101", {}, 44_549_160),
        ("ResNet152", {}, 60_192_808),
        ("ResNet50", {"variant": "v1"}, 25_557_032),
        ("ResNet18", {"shortcut": "A"}, 11_515_688),
        ("ResNet18", {"shortcut": "C"}, 12_043_816),
        ("ResNet34", {"shortcut": "A"}, 21_623_848),
        ("ResNet34", {"shortcut": "C"}, 22_716_840),
        ("ResNet50", {"shortcut": "C"}, 40_128_552),
    ],
)
def test_number_of_parameters(name, arguments, expected):
    with torch.device("meta"):
        assert number_of_parameters(CLASSES[name](**arguments)) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_structure_is_torchvisions(torchvision, name):
    with torch.device("meta"):
        ours, theirs = CLASSES[name](), getattr(torchvision, name.lower())()
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in theirs.named_modules()]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ours.load_state_dict(theirs.state_dict(), assign=True)


@pytest.mark.parametrize(
    ("name", "zero_init_residual"), [("ResNet18", False), ("ResNet18", True), ("ResNet50", True)]
)
def test_one_seed_gives_torchvisions_initial_values(torchvision, name, zero_init_residual):
    states = []
    for make in (CLASSES[name], getattr(torchvision, name.lower())):
        torch.manual_seed(5)
        states.append(make(num_classes=10, zero_init_residual=zero_init_residual).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_logits(torchvision, backend, name, training, memory_format):
    ours, theirs = (m.to(memory_format=memory_format).train(training) for m in twins(torchvision, name))
    x = images().contiguous(memory_format=memory_format)
    with torch.no_grad(), FusedOps() as ops:
        assert relative(ours(x), theirs(x)) < 1e-4
    if backend == "reference":
        assert ops.batch_norms == {"ResNet18": 20, "ResNet50": 53}[name]


@pytest.mark.parametrize("name", ["ResNet34", "ResNet101", "ResNet152"])
def test_logits_of_the_other_depths(torchvision, name):
    ours, theirs = (m.eval() for m in twins(torchvision, name, num_classes=10))
    with torch.no_grad():
        assert relative(ours(images(32, 2)), theirs(images(32, 2))) < 1e-4


class Shallow(ResNet):
    """One bottleneck a stage: deeper nets magnify rounding, by every ReLU that it flips."""

    block, depths = Bottleneck, (1, 1, 1, 1)


@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bottlenecks", [False, True], ids=["basic", "bottleneck"])
def test_training_step(torchvision, backend, bottlenecks, memory_format):
    """Gradients err from torchvision's in fp64 no more than twice as far as its own in fp32 do."""
    x = images(64, 8).contiguous(memory_format=memory_format)
    target = torch.arange(len(x))
    if bottlenecks:
        torch.manual_seed(0)
        theirs = torchvision.ResNet(torchvision.resnet.Bottleneck, Shallow.depths, num_classes=10)
        ours = Shallow(num_classes=10)
        ours.load_state_dict(theirs.state_dict())
    else:
        ours, theirs = twins(torchvision, "ResNet18", num_classes=10)
    exact = copy.deepcopy(theirs).double()
    gradients, buffers = [], []
    for model, data in ((ours, x), (theirs, x), (exact, x.double())):
        model.to(memory_format=memory_format).train()
        nn.functional.cross_entropy(model(data), target).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        buffers.append(dict(model.named_buffers()))
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-4, atol=1e-5)
    found, eager = (
        torch.tensor([relative(step[key], gradients[2][key]) for key in step]) for step in gradients[:2]
    )
    assert found.median() <= 2 * eager.median() + 1e-5
    assert found.max() <= 2 * eager.max() + 1e-3


def test_training_step_in_fp64(torchvision):
    ours, theirs = (m.double() for m in twins(torchvision, "ResNet50", num_classes=10))
    x = images(48).double()
    with fusedres.backend("reference"):
        ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-9, key


@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_bf16_autocast(torchvision, backend, memory_format):
    ours, theirs = (m.to(memory_format=memory_format) for m in twins(torchvision, "ResNet18", num_classes=10))
    x = images().contiguous(memory_format=memory_format)
    exact = copy.deepcopy(theirs)(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = ours(x), theirs(x)
    assert found.dtype == eager.dtype == torch.bfloat16
    assert relative(found, exact) <= 2 * relative(eager, exact)
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {"groups": 4, "width_per_group": 16},
    "wide": {"width_per_group": 96},
    "dilation": {"replace_stride_with_dilation": [False, True, True]},
    "norm arguments": {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-2, momentum=None)},
    "group norm": {"norm_layer": functools.partial(nn.GroupNorm, 8)},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_constructor_arguments(torchvision, case):
    ours, theirs = twins(torchvision, "ResNet50", num_classes=10, **OPTIONS[case])
    with fusedres.backend("reference"), FusedOps() as ops:
        assert relative(ours(images()), theirs(images())) < 1e-4
    assert ops.batch_norms == (0 if case == "group norm" else 53)


def test_frozen_batch_norm(torchvision):
    frozen = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    ours, theirs = twins(torchvision, "ResNet18", num_classes=10, norm_layer=frozen)
    with fusedres.backend("reference"), FusedOps() as ops:
        out = ours(images())
    assert ops.batch_norms == ops.calls["bn_running_stats"] == 20
    expected = theirs(images())
    assert relative(out, expected) < 1e-4
    out.sum().backward()
    expected.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-3


def test_v1_has_the_stride_on_the_first_convolution(torchvision):
    ours, theirs = fusedres.ResNet50(num_classes=10, variant="v1"), torchvision.resnet50(num_classes=10)
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert relative(ours.eval()(images()), theirs.eval()(images())) < 1e-4
    assert {m.conv2.stride for m in ours.modules() if isinstance(m, Bottleneck)} == {(1, 1)}


def test_zero_shortcut_is_the_identity_on_its_channels():
    model = fusedres.ResNet18(num_classes=10, shortcut="A").eval()
    x = torch.rand(2, 64, 8, 8)
    out = model.layer2[0].downsample(x)
    assert torch.equal(out, torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 64, 4, 4)], dim=1))
    assert model(images()).shape == (4, 10)


def test_features_are_torchvisions(torchvision):
    """torchvision's fx feature extractor finds the same nodes, with the same values."""
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    ours, theirs = (m.eval() for m in twins(torchvision, "ResNet18", num_classes=10))
    names = [sorted(extraction.get_graph_node_names(model)[0]) for model in (ours, theirs)]
    assert names[0] == names[1]
    nodes = ["relu", "layer2.0.bn1", "layer3.1.relu_1", "layer4"]
    with torch.no_grad():
        found, expected = (extraction.create_feature_extractor(m, nodes)(images()) for m in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torch_compile_has_one_graph(backend, training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fusedres.ResNet18(num_classes=10).train(training)
    twin = copy.deepcopy(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph_module)
        return graph_module

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for _ in range(2):
        compiled(images(32)).square().sum().backward()
        twin(images(32)).square().sum().backward()
    assert len(graphs) == 1
    if backend == "reference":
        calls = [n for m in graphs[0].modules() for n in m.graph.nodes if "fusedres.bn_act" in str(n.target)]
        assert len(calls) >= 20
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ResNet50", {"variant": "v2"}, "variant must be one of 'v1.5', 'v1', got 'v2'"),
        ("ResNet18", {"shortcut": "D"}, "shortcut must be one of 'A', 'B', 'C', got 'D'"),
        ("ResNet50", {"shortcut": "A"}, "shortcut must be 'B' or 'C' in a net of bottlenecks .*, got 'A'"),
        ("ResNet18", {"num_classes": 0}, "num_classes must be a positive integer, got 0"),
        ("ResNet18", {"num_classes": "ten"}, "num_classes must be a positive integer, got 'ten'"),
        ("ResNet50", {"replace_stride_with_dilation": [True]}, r"replace_stride_with_dilation .*\[True\]"),
        ("ResNet18", {"replace_stride_with_dilation": [False, False, True]}, "dilation .* must be 1 .* 2"),
        ("ResNet18", {"groups": 32}, "groups must be 1 in a net of basic blocks, got 32"),
        ("ResNet34", {"width_per_group": 128}, r"width_per_group\) must be 64 .*, got 128"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        CLASSES[name](**arguments)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        (
            "ResNet50",
            "ResNet101",
            r"must have 3\+4\+6\+3 blocks of 3 conv.* got 3\+4\+23\+3 blocks of 3 conv",
        ),
        ("ResNet50", "ResNet34", "must have .* of 3 convolutions for ResNet50, got .* of 2 convolutions"),
    ],
)
def test_weights_of_another_depth(model, weights, message):
    with torch.device("meta"):
        ours, other = CLASSES[model](), CLASSES[weights]()
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(other.state_dict(), assign=True)


def test_weights_of_a_part_load_as_in_torch():
    model = fusedres.ResNet18(num_classes=10)
    part = {key: value for key, value in model.state_dict().items() if key.startswith("layer1.0")}
    found = model.load_state_dict(part, strict=False)
    assert not found.unexpected_keys and "layer1.1.conv1.weight" in found.missing_keys
    with pytest.raises(RuntimeError, match="size mismatch for fc.weight"):
        model.load_state_dict(fusedres.ResNet18(num_classes=7).state_dict())


@pytest.fixture
def stored_weights(torchvision, monkeypatch) -> dict[str, Tensor]:
    """What any of torchvision's weights for ResNet-18 holds, in place of a download."""
    torch.manual_seed(9)
    state: dict[str, Tensor] = torchvision.resnet18().state_dict()

    def get_state_dict(self: Any, *, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        assert check_hash and not progress
        return state

    monkeypatch.setattr(torchvision.WeightsEnum, "get_state_dict", get_state_dict)
    return state


@pytest.mark.parametrize(
    "spelling", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "enum", "with classes"]
)
def test_pretrained_weights(torchvision, stored_weights, spelling):
    weights = torchvision.ResNet18_Weights.DEFAULT if spelling in ("enum", "with classes") else spelling
    more = {"num_classes": 1000} if spelling == "with classes" else {}
    model = fusedres.resnet18(weights=weights, progress=False, **more)
    assert isinstance(model, fusedres.ResNet18)
    torch.testing.assert_close(dict(model.state_dict()), dict(stored_weights), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "IMAGENET1K_V3"}, "weights of resnet18 .*'IMAGENET1K_V1', 'DEFAULT', got IMAGENET1K_V3"),
        ({"weights": "ResNet50_Weights.IMAGENET1K_V2"}, "in ResNet18_Weights, .* got ResNet50_Weights"),
        ({"weights": 18}, "weights of resnet18 must be .*, got 18"),
        ({"weights": "DEFAULT", "num_classes": 10}, "num_classes must be 1000 with weights=.*, got 10"),
        ({"weights": "DEFAULT", "shortcut": "A"}, "shortcut must be 'B' with weights=.*, got 'A'"),
        ({"weights": "DEFAULT", "variant": "v1"}, "variant must be 'v1.5' with weights=.*, got 'v1'"),
    ],
)
def test_wrong_weights(torchvision, arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedres.resnet18(**arguments)


def test_enum_of_another_depth(torchvision):
    with pytest.raises(ValueError, match="weights of resnet18 .*, got ResNet50_Weights.IMAGENET1K_V2"):
        fusedres.resnet18(weights=torchvision.ResNet50_Weights.IMAGENET1K_V2)


def test_weights_need_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        fusedres.resnet50(weights="DEFAULT")


@pytest.mark.parametrize("name", CLASSES)
def test_builders(name):
    with torch.device("meta"):
        model = getattr(fusedres, name.lower())(num_classes=7)
    assert type(model) is CLASSES[name]
    assert model.fc.out_features == 7
