"""A user's program for ``mypy --strict`` (make lint): nothing that a public function gives is Any.

What the call of a module gives is Any in PyTorch, and so here; so are torchvision's detectors, which have no
types.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import assert_type

import torch
from torch import Tensor, nn

import fusedres
from fusedres import detection
from fusedres.inference import OptimizedResNet


def nets() -> None:
    assert_type(fusedres.ResNet50(num_classes=10, variant="v1", shortcut="C"), fusedres.ResNet50)
    net = fusedres.resnet18(num_classes=10)
    assert_type(net, fusedres.ResNet18)
    assert_type(net.forward(torch.randn(2, 3, 32, 32)), Tensor)
    assert_type(fusedres.CifarResNet(20), fusedres.CifarResNet)
    assert_type(fusedres.PlainNet18(num_classes=10), fusedres.PlainNet18)


def swapped(net: nn.Sequential) -> None:
    assert_type(fusedres.convert(net), nn.Sequential)
    assert_type(fusedres.revert(net), nn.Sequential)
    for entry in fusedres.coverage(net):
        assert_type(entry.name, str)
        assert_type(entry.fused, bool)
        assert_type(entry.reason, str | None)
    for step in fusedres.explain(net, (2, 3, 32, 32)):
        assert_type(step.implementation, str)
        assert_type(step.shape, tuple[int, ...])
    with fusedres.backend("reference") as nothing:
        assert_type(nothing, None)


def one_op(x: Tensor, norm: nn.BatchNorm2d) -> None:
    z = fusedres.functional.bn_act(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual=x, training=True
    )
    assert_type(z, Tensor)
    assert_type(fusedres.functional.global_avg_pool(x), Tensor)


def trained(net: nn.Module, images: Tensor) -> None:
    fast = fusedres.optimize_for_inference(net, dtype=torch.bfloat16)
    assert_type(fast, OptimizedResNet)
    assert_type(fast.forward(images), Tensor)
    small = fusedres.quantize_for_inference(net, calibration=images)
    assert_type(small, OptimizedResNet)


def found(images: Tensor) -> None:
    net = fusedres.ResNet18()
    trunk = detection.Trunk(net, {"layer3": "a", "layer4": "b"})
    assert_type(trunk.forward(images), OrderedDict[str, Tensor])


def main() -> None:
    nets()
    swapped(nn.Sequential(fusedres.ResNet18()))
    one_op(torch.randn(2, 8, 4, 4), nn.BatchNorm2d(8))
    images = torch.randn(2, 3, 32, 32)
    trained(fusedres.CifarResNet(8).eval(), images)
    found(images)


if __name__ == "__main__":
    main()
