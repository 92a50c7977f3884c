"""The other side of the comparison: ResNets as plain PyTorch modules.

torchvision's where it is installed and has the net. Else the nets below, which run the same operators in
the same order as torchvision's (nn.Conv2d, nn.BatchNorm2d, an in-place nn.ReLU, ``out += identity``)
and have its state_dict keys. They share no code with the fused models.
"""

from __future__ import annotations

import importlib
import importlib.metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.cli.errors import first_line
from fusedres.models.build import CIFAR

_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class EagerBlock(nn.Module):
    """Convolutions with batch norm, an addition and a ReLU, one operator each.

    Args:
        convolutions: (channels in, channels out, kernel size, stride) of each.
        padded: a shortcut between unequal shapes has zeros for new channels, and no projection.
    """

    def __init__(self, *convolutions: tuple[int, int, int, int], padded: bool = False) -> None:
        super().__init__()
        self.depth = len(convolutions)
        for index, (inputs, outputs, size, stride) in enumerate(convolutions, 1):
            conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)
        first, last = convolutions[0], convolutions[-1]
        stride = max(convolution[3] for convolution in convolutions)
        self.downsample: nn.Module | None = None
        if padded and first[0] != last[1]:
            self.downsample = _Padded(stride, last[1] - first[0])
        elif first[0] != last[1] or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(first[0], last[1], 1, stride, bias=False), nn.BatchNorm2d(last[1])
            )

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for index in range(1, self.depth + 1):
            out = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(out))
            if index < self.depth:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


class _Padded(nn.Module):
    """The shortcut of option A (He et al. 2015, section 3.3)."""

    def __init__(self, stride: int, new: int) -> None:
        super().__init__()
        self.stride, self.new = stride, new

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))


class EagerCifarResNet(nn.Module):
    """A ResNet of 6n+2 layers for CIFAR without any fusion (He et al. 2015, section 4.2).

    Args:
        depth: 6n+2.

    Shapes:
        [N, 3, H, W] -> [N, 10]
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        inputs = 16
        for stage in range(3):
            width, blocks = 16 << stage, []
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(EagerBlock((inputs, width, 3, stride), (width, width, 3, 1), padded=True))
                inputs = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 4):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class EagerResNet(nn.Module):
    """ResNet-18 to 152 without any fusion.

    Args:
        name: "resnet18" .. "resnet152".

    Shapes:
        [N, 3, H, W] -> [N, 1000]
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        bottleneck = name not in ("resnet18", "resnet34")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for stage, depth in enumerate(_DEPTHS[name]):
            width = 64 << stage
            outputs = 4 * width if bottleneck else width
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                if bottleneck:
                    convs = ((inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
                    blocks.append(EagerBlock(*convs))
                else:
                    blocks.append(EagerBlock((inputs, width, 3, stride), (width, width, 3, 1)))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def build(name: str) -> tuple[nn.Module, str]:
    """The eager model ``name`` with random weights, and where its code comes from."""
    if name in CIFAR:
        return EagerCifarResNet(CIFAR[name]), "fusedres.cli.bench.eager"
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        return EagerResNet(name), f"fusedres.cli.bench.eager (torchvision: {first_line(error)})"
    return getattr(models, name)(weights=None), f"torchvision {importlib.metadata.version('torchvision')}"
