"""Small nets of every origin, fused, each with an eager twin that shares no code with it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedres
from fusedres.models.resnet import ResNet
from fusedres.nn import BasicBlock, Bottleneck

CLASSES = 5


class SmallBasic(ResNet):
    block, depths = BasicBlock, (1, 1, 1, 1)


class SmallBottleneck(ResNet):
    block, depths = Bottleneck, (1, 1, 1, 1)


class EagerBlock(nn.Module):
    """The forward of He et al. 2015, figure 5, on the children of a block of ours, written out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        shortcut = block.downsample(x) if hasattr(block, "downsample") else x
        x = functional.relu(block.bn1(block.conv1(x)))
        x = block.bn2(block.conv2(x))
        if hasattr(block, "conv3"):
            x = block.bn3(block.conv3(functional.relu(x)))
        return functional.relu(x + shortcut)


class Eager(nn.Module):
    """The forward of table 1, likewise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name, child in net.named_children():
            stage = isinstance(child, nn.Sequential)
            self.add_module(name, nn.Sequential(*map(EagerBlock, child)) if stage else child)

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self
        x = net.maxpool(functional.relu(net.bn1(net.conv1(x))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return net.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _ours(net: type[ResNet]) -> tuple[nn.Module, nn.Module]:
    fused = net(num_classes=CLASSES)
    return Eager(copy.deepcopy(fused)), fused


def _torchvision(block: str) -> tuple[nn.Module, nn.Module]:
    pytest.importorskip("torchvision")
    resnet: Any = importlib.import_module("torchvision.models.resnet")
    eager = resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=CLASSES)
    return eager, fusedres.convert(eager, inplace=False)


def _timm(block: str) -> tuple[nn.Module, nn.Module]:
    pytest.importorskip("timm")
    resnet: Any = importlib.import_module("timm.models.resnet")
    eager = resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=CLASSES)
    return eager, fusedres.convert(eager, inplace=False)


NETS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "basic": lambda: _ours(SmallBasic),
    "bottleneck": lambda: _ours(SmallBottleneck),
    "torchvision basic": lambda: _torchvision("BasicBlock"),
    "torchvision bottleneck": lambda: _torchvision("Bottleneck"),
    "timm basic": lambda: _timm("BasicBlock"),
    "timm bottleneck": lambda: _timm("Bottleneck"),
}


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """An eager net and the fused one of the same parameters: statistics as after some training."""
    torch.manual_seed(0)
    eager, fused = NETS[name]()
    for one, other in zip(eager.modules(), fused.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d):
            nn.init.normal_(one.running_mean, std=0.1)
            nn.init.uniform_(one.running_var, 0.8, 1.2)
            nn.init.uniform_(one.weight, 0.5, 1)
            other.load_state_dict(one.state_dict())
    return eager, fused


def images(n: int = 4, size: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype)


@pytest.fixture(params=["cpu", "reference"])
def fused_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Fused even where an input is so small that PyTorch's operators would be left to it."""
    if request.param == "cpu":
        pytest.importorskip("fusedres._C")
    with fusedres.backend(request.param):
        yield request.param
