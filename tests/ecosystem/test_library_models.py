"""What timm and torchvision test of each of their ResNets, before and after it is converted.

Forward, backward, features, a new classifier, torch.fx and TorchScript, on one instance, so that its own
results are the oracle. ``-m full`` takes every model that has residual blocks.
"""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres

torchvision: Any = pytest.importorskip("torchvision")
timm: Any = pytest.importorskip("timm")
models: Any = importlib.import_module("torchvision.models")
extraction: Any = importlib.import_module("torchvision.models.feature_extraction")

QUICK_TIMM = ("resnet18", "resnet18d", "seresnet18", "test_resnet")
QUICK_TORCHVISION = ("resnet18",)
PLAIN = fusedres.register_with_timm()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Scripted and traced nets are cycles: what a test leaves goes before the next."""
    yield
    gc.collect()


def named(quick: tuple[str, ...], names: list[str]) -> list[Any]:
    full = [pytest.param(name, marks=pytest.mark.full) for name in names if name not in quick]
    return [*quick, *full]


TIMM = named(QUICK_TIMM, timm.list_models(module="resnet"))
TORCHVISION = named(QUICK_TORCHVISION, models.list_models(module=models.resnet))


def statistics(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return net


def forward(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out: Any = net.eval()(x)
    return [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)


def backward(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient of every parameter; one without fails."""
    torch.manual_seed(1)  # of drop paths
    net.train()(x).square().mean().backward()
    gradients = []
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients


def fx(net: nn.Module, x: Tensor) -> list[Tensor]:
    return forward(torch.fx.symbolic_trace(net.eval()), x)


def script(net: nn.Module, x: Tensor) -> list[Tensor]:
    return forward(torch.jit.script(net.eval()), x)


def extracted(net: nn.Module, x: Tensor) -> list[Tensor]:
    return forward(extraction.create_feature_extractor(net.eval(), ["layer2", "layer4"]), x)


def forward_features(net: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        features = net.eval().forward_features(x)
        return [features, net.forward_head(features), *net.forward_intermediates(x, intermediates_only=True)]


def checkpointed(net: Any, x: Tensor) -> list[Tensor]:
    net.set_grad_checkpointing(True)
    gradients = backward(net, x)
    net.set_grad_checkpointing(False)
    return gradients


Use = Callable[[Any, Tensor], list[Tensor]]
USES: tuple[Use, ...] = (forward, backward, fx, script, extracted)
TIMM_USES: tuple[Use, ...] = (*USES, forward_features, checkpointed)


def check(net: Any, uses: tuple[Use, ...], plain: bool) -> None:
    """In float64; every block and stem of a ``plain`` net is fused."""
    statistics(net).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    # nothing here changes a parameter, and the largest nets have 4 GB of them
    buffers = copy.deepcopy(dict(net.named_buffers()))
    expected: dict[Use, list[Tensor]] = {}
    for use in uses:
        try:
            expected[use] = use(net, x)
        except Exception:  # what the library's own can't, a converted one needn't
            assert use not in (forward, backward)
        net.load_state_dict(buffers, strict=False)
    fusedres.convert(net)
    assert not plain or all(entry.fused for entry in fusedres.coverage(net))
    for use, theirs in expected.items():
        compare(use(net, x), theirs, use.__name__)
        net.load_state_dict(buffers, strict=False)


def compare(ours: list[Tensor], theirs: list[Tensor], use: str) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text: f"{use}: {text}")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    check(models.get_model(name, num_classes=10), USES, plain=True)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    net = timm.create_model(name, num_classes=10)
    check(net, TIMM_USES, plain=f"fused_{name}" in PLAIN)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    net.reset_classifier(0, "")
    ours = forward(net, x)
    assert ours[0].shape[1:] == (net.num_features, 2, 2)
    compare(ours, forward(fusedres.revert(net), x), "without a classifier")


@pytest.mark.parametrize("name", TIMM)
def test_timms_features(name):
    net = statistics(timm.create_model(name, features_only=True)).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    theirs = forward(net, x)
    ours = forward(fusedres.convert(net), x)
    assert [t.shape[1] for t in ours] == net.feature_info.channels()
    compare(ours, theirs, "features_only")


@pytest.mark.parametrize(
    "name",
    [
        "fcn_resnet50",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("deeplabv3_resnet50", "fcn_resnet101")),
    ],
)
def test_segmentation(name):
    net = models.get_model(name, weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    check(net, (forward,), plain=True)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
    ],
)
def test_detection(name):
    """In float64: boxes are sorted by scores, and those of an untrained net are close together."""
    net = models.get_model(name, weights=None, weights_backbone=None, min_size=224)
    net.score_thresh = 0.0  # of those of one stage, whose untrained scores are below theirs
    statistics(net).double().eval()
    images = [torch.rand(3, *size, dtype=torch.float64) for size in ((96, 128), (128, 96))]
    with torch.no_grad():
        theirs = net(images)
        assert all(len(one["boxes"]) for one in theirs)
        fusedres.convert(net)
        assert any(entry.fused for entry in fusedres.coverage(net))
        ours = net(images)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], msg=lambda text, key=key: f"{key}: {text}")
