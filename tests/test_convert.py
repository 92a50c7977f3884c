"""torchvision's and timm's nets with fused forwards: their results, their keys, and back."""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_ops import FusedOps
from torch import Tensor, nn

import fusedres
from fusedres.detection import Trunk

pytest.importorskip("torchvision")
models: Any = importlib.import_module("torchvision.models")


def torchvision_net(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(num_classes=5, **arguments)


def timm_net(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, **({"num_classes": 5} | arguments))  # type: ignore[no-any-return]

    return make


# how many blocks and stems there are, and how many of them are fused
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (torchvision_net("resnet18"), 9, 9),
    "resnet50": (torchvision_net("resnet50"), 17, 17),
    "wide_resnet50_2": (torchvision_net("wide_resnet50_2"), 17, 17),
    "resnext50": (torchvision_net("resnext50_32x4d"), 17, 17),
    "dilated": (torchvision_net("resnet50", replace_stride_with_dilation=[False, True, True]), 17, 17),
    "timm resnet18": (timm_net("resnet18"), 9, 9),
    "timm resnet50": (timm_net("resnet50"), 17, 17),
    "timm resnet26d": (timm_net("resnet26d"), 9, 9),
    "timm resnet18d": (timm_net("resnet18d"), 9, 9),
    "timm resnetrs50": (timm_net("resnetrs50"), 17, 0),
    "timm features": (timm_net("resnet18", features_only=True, num_classes=1000), 8, 8),
}


def outputs(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return list(out.values()) if isinstance(out, dict) else list(out)


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The library's net, and a converted copy; statistics as after some training."""
    torch.manual_seed(0)
    net = NETS[name][0]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.5, 1)
    return net, fusedres.convert(net, inplace=False)


@pytest.mark.parametrize("name", NETS)
def test_coverage(name):
    make, total, fused = NETS[name]
    net = make()
    before = fusedres.coverage(net)
    assert len(before) == total and not any(entry.fused for entry in before)
    with contextlib.nullcontext() if fused else pytest.warns(UserWarning, match="nothing is converted"):
        converted = fusedres.convert(net)
    assert converted is net
    entries = fusedres.coverage(net)
    assert len(entries) == total and sum(entry.fused for entry in entries) == fused
    assert [entry.name for entry in entries] == [entry.name for entry in before]
    assert all((entry.reason is None) == entry.fused for entry in entries)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [name for name in NETS if not name.startswith("wide")])  # as resnet50
def test_results_are_the_librarys(name, training):
    """Outputs, all gradients and statistics, in float64."""
    theirs, ours = twins(name)
    theirs, ours = theirs.double().train(training), ours.double().train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    for net in (theirs, ours):
        torch.manual_seed(1)  # of drop paths
        sum(out.square().mean() for out in outputs(net(x))).backward()
    torch.manual_seed(1)
    expected = outputs(theirs(x))
    torch.manual_seed(1)
    for found, out in zip(outputs(ours(x)), expected, strict=True):
        torch.testing.assert_close(found, out)
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=key)
    for (key, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "timm resnet18", "timm resnet18d"])
def test_the_fused_path_runs(name):
    theirs, ours = twins(name)
    x = torch.randn(2, 3, 32, 32)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    with fusedres.backend("reference"), FusedOps() as calls:
        theirs(x)
        assert calls.batch_norms == 0
        ours(x)
    assert calls.batch_norms == norms


@pytest.mark.parametrize("name", ["resnet50", "timm resnet26d"])
def test_revert_restores_the_model(name):
    theirs, ours = twins(name)
    kinds = [type(module) for module in theirs.modules()]
    assert [type(module) for module in ours.modules()] != kinds
    assert fusedres.revert(ours) is ours
    assert [type(module) for module in ours.modules()] == kinds
    assert vars(ours).keys() == vars(theirs).keys()
    fusedres.revert(theirs)
    assert [type(module) for module in theirs.modules()] == kinds


@pytest.mark.parametrize("name", ["resnet18", "timm resnet18"])
def test_converting_twice(name):
    _, ours = twins(name)
    kinds = [type(module) for module in ours.modules()]
    fusedres.convert(ours, strict=True)
    assert [type(module) for module in ours.modules()] == kinds
    assert isinstance(ours.layer1[0], NETS[name][0]().layer1[0].__class__)
    assert type(ours.layer1[0]).__module__.startswith("fusedres._convert")


def test_a_filter():
    net = models.resnet18()
    fusedres.convert(net, lambda name, module: name.startswith("layer2"))
    assert [entry.name for entry in fusedres.coverage(net) if entry.fused] == ["layer2.0", "layer2.1"]
    fusedres.convert(net, lambda name, module: name == "stem")
    assert sum(entry.fused for entry in fusedres.coverage(net)) == 3


def test_a_copy_leaves_the_model_alone():
    net = models.resnet18()
    twin = fusedres.convert(net, inplace=False)
    assert type(net.layer1[0]) is models.resnet.BasicBlock and twin is not net
    assert not any(entry.fused for entry in fusedres.coverage(net))


class OwnNorm(nn.BatchNorm2d):
    """It may compute something else."""


@pytest.mark.parametrize(
    ("norm", "layer"), [("GroupNorm", lambda channels: nn.GroupNorm(4, channels)), ("OwnNorm", OwnNorm)]
)
def test_a_norm_that_can_not_be_fused(norm, layer):
    """The model stays, and says why."""
    net = models.resnet18(norm_layer=layer)
    kinds, state = [type(module) for module in net.modules()], copy.deepcopy(net.state_dict())
    said = f"9 of 9 can't be fused, first stem: the norm is a {norm}, not an nn.BatchNorm2d"
    with pytest.warns(UserWarning, match=f"{said} or FrozenBatchNorm2d: nothing is converted"):
        assert fusedres.convert(net) is net
    with pytest.raises(ValueError, match=said):
        fusedres.convert(net, strict=True)
    assert [type(module) for module in net.modules()] == kinds
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert all(f"{norm}, not an nn.BatchNorm2d" in str(entry) for entry in fusedres.coverage(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a filter that wants nothing has what it wants
        fusedres.convert(net, lambda name, module: False, strict=True)


class OwnBlock(models.resnet.BasicBlock):  # type: ignore[misc]
    """Derived, so that its forward may be another."""


class OwnNet(models.ResNet):  # type: ignore[misc]
    """Likewise."""


def test_classes_that_are_not_exactly_a_librarys():
    """They stay, are listed as such, and strict refuses them."""
    net = OwnNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.layer2 = nn.Sequential(OwnBlock(64, 128, 2, net.layer2[0].downsample), nn.Dropout2d(0.1))
    net.layer3 = nn.Sequential(nn.Sequential(nn.Conv2d(128, 256, 1)))
    why = "its class, {}, is not exactly one of torchvision's or timm's"
    with pytest.raises(ValueError, match=f"3 of 5 can't be fused, first stem: {why.format('OwnNet')}"):
        fusedres.convert(net, strict=True)
    assert [entry.name for entry in fusedres.coverage(fusedres.convert(net)) if entry.fused] == [
        "layer1.0",
        "layer4.0",
    ]
    assert {entry.name: entry.reason for entry in fusedres.coverage(net) if not entry.fused} == {
        "stem": why.format("OwnNet"),
        "layer2.0": why.format("OwnBlock"),
        "layer3.0": why.format("Sequential"),
    }


def test_what_got_another_class_after_the_conversion():
    """As FSDP2 gives one: it stays fused, and revert says that it can't bring the library's back."""
    net = fusedres.convert(models.resnet18())
    block = net.layer2[0]
    block.__class__ = type("Sharded", (type(block),), {})
    kinds = [type(module) for module in net.modules()]
    assert all(entry.fused for entry in fusedres.coverage(fusedres.convert(net, strict=True)))
    with pytest.raises(ValueError, match=r"layer2.0 was made a Sharded since: revert before that"):
        fusedres.revert(net)
    assert [type(module) for module in net.modules()] == kinds


@pytest.mark.parametrize("call", [fusedres.convert, fusedres.coverage, fusedres.revert])
@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("resnet18", "str"),
        (None, "NoneType"),
        (models.ResNet, "the class ResNet"),
        (models.resnet18, "function"),
    ],
)
def test_no_module(call, model, given):
    with pytest.raises(TypeError, match=f"model must be an nn.Module, got {given}"):
        call(model)


def test_strict_changes_nothing_where_a_part_can_not_be_fused():
    net = models.resnet18()
    net.layer3[1].relu = nn.GELU()
    with pytest.raises(ValueError, match="1 of 9 can't be fused, first layer3.1: the activation is a GELU"):
        fusedres.convert(net, strict=True)
    assert not any(entry.fused for entry in fusedres.coverage(net))
    fusedres.convert(net)
    assert [entry.name for entry in fusedres.coverage(net) if not entry.fused] == ["layer3.1"]


def test_our_own_trunks():
    net = Trunk(fusedres.ResNet18(), {"layer3": "out"})
    entries = fusedres.coverage(nn.Sequential(net))
    assert [entry.name for entry in entries][:2] == ["0.stem", "0.layer1.0"] and len(entries) == 7
    assert all(entry.fused for entry in entries)


def test_nothing_to_convert():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="Sequential has no residual block or stem of torchvision or timm"):
        assert fusedres.convert(net) is net
    with pytest.raises(ValueError, match="no residual block"):
        fusedres.convert(net, strict=True)
    assert fusedres.coverage(net) == []
    mobile = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.warns(UserWarning, match="LRASPP has no residual block or stem"):
        fusedres.convert(mobile)


def test_our_own_nets_are_fused_already():
    net = fusedres.ResNet18()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedres.convert(net, strict=True)
    entries = fusedres.coverage(net)
    assert len(entries) == 9 and all(entry.fused for entry in entries) and entries[0].name == "stem"
    net.layer1[0].bn1.register_forward_hook(lambda *a: None)
    assert {e.name: e.reason for e in fusedres.coverage(net) if not e.fused} == {
        "layer1.0": "the norm has a hook"
    }


@pytest.mark.parametrize(("name", "act"), [("resnet18", "relu"), ("timm resnet18", "act1")])
def test_a_change_after_the_conversion_is_followed(name, act):
    """A hook, another activation: the block runs child by child, with the library's results."""
    theirs, ours = twins(name)
    seen = []
    for net in (theirs, ours):
        setattr(net.layer1[0], act, nn.Tanh())
        net.layer2[0].bn1.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    unfused = [entry.name for entry in fusedres.coverage(ours) if not entry.fused]
    assert unfused == ["layer1.0", "layer2.0"]


@pytest.mark.parametrize("name", ["resnet18", "timm resnet18"])
@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_traced_and_scripted(name):
    theirs, ours = twins(name)
    x = torch.randn(1, 3, 32, 32)
    expected = theirs.eval()(x)
    graph = torch.fx.symbolic_trace(ours.eval())
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) > 50
    torch.testing.assert_close(torch.jit.script(ours)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), expected, rtol=1e-4, atol=1e-5)


def test_detectors_and_segmentation_nets():
    for net in (
        models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None),
        models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
    ):
        entries = fusedres.coverage(fusedres.convert(net))
        assert len(entries) == 17 and all(entry.fused for entry in entries)
    assert {"backbone.stem", "backbone.layer4.2"} <= {entry.name for entry in entries}


def test_outputs_of_a_segmentation_net():
    torch.manual_seed(0)
    theirs = (
        models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).double().eval()
    )
    ours = fusedres.convert(theirs, inplace=False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x)["out"], theirs(x)["out"])
    getter = models._utils.IntermediateLayerGetter(models.resnet18(), {"relu": "early", "layer2": "late"})
    getter.double().eval()
    expected = getter(x)
    fusedres.convert(getter)
    assert fusedres.coverage(getter)[0].reason == "it has no stem, or gives parts of it"
    for name, out in getter(x).items():
        torch.testing.assert_close(out, expected[name])


def test_what_timms_nets_are_used_for():
    """Features, intermediates, checkpointing and another classifier."""
    theirs, ours = twins("timm resnet50")
    theirs, ours = theirs.double(), ours.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
    for found, expected in zip(
        ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True
    ):
        torch.testing.assert_close(found, expected)
    for net in (theirs, ours):
        net.set_grad_checkpointing()
        torch.manual_seed(0)
        net.reset_classifier(7)
        net.zero_grad()
        net.double()(x).square().sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert [f["module"] for f in ours.feature_info] == [f["module"] for f in theirs.feature_info]


def test_timms_registry():
    timm = pytest.importorskip("timm")
    names = fusedres.register_with_timm()
    assert {"fused_resnet18", "fused_resnet50", "fused_resnet152", "fused_resnet50d"} <= {*names}
    assert {"fused_wide_resnet50_2", "fused_resnext50_32x4d"} <= {*names} <= {*timm.list_models("fused_*")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusedres.register_with_timm() == names  # again changes nothing
    for name in names:
        with torch.device("meta"):
            entries = fusedres.coverage(timm.create_model(name))
        assert sum(entry.fused for entry in entries) >= len(entries) // 2, name
    # what is known of the weights is timm's
    weights = timm.list_pretrained("fused_resnet50.*")
    assert len(weights) > 10 and weights == [f"fused_{name}" for name in timm.list_pretrained("resnet50.*")]
    for tag in ("", ".tv_in1k"):
        ours, theirs = (timm.get_pretrained_cfg(f"{prefix}resnet50{tag}") for prefix in ("fused_", ""))
        assert (ours.hf_hub_id, ours.url, ours.mean) == (theirs.hf_hub_id, theirs.url, theirs.mean)


def test_a_registered_model_is_timms():
    timm = pytest.importorskip("timm")
    fusedres.register_with_timm()
    theirs = timm.create_model("resnet18", num_classes=3).eval()
    ours = timm.create_model("fused_resnet18", num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)
    ours.set_grad_checkpointing()
    ours.reset_classifier(7)
    assert ours.train()(x).shape == (1, 7) and ours.feature_info == theirs.feature_info
    features = timm.create_model("fused_resnet18", features_only=True, out_indices=(2, 4))
    assert [out.shape[1] for out in features(x)] == features.feature_info.channels() == [128, 512]
    assert all(entry.fused for entry in fusedres.coverage(features))
