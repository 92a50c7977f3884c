"""The layer shapes of the nets, read off a forward pass on the meta device.

``python benchmarks/shapes.py resnet50`` prints them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import plan
from fusedres.cli.bench.eager import EagerBlock, EagerResNet
from fusedres.cli.roofline import nets
from fusedres.plan import traffic

IMAGE_SIZE = 224


class Norm(NamedTuple):
    """A batch norm, and what follows it."""

    channels: int
    height: int
    width: int
    residual: bool
    relu: bool

    def __str__(self) -> str:
        follows = "+residual" * self.residual + "+relu" * self.relu
        return f"{self.channels}x{self.height}x{self.width}{follows}"

    def values(self, batch: int) -> int:
        """Values in a tensor of ``batch`` images."""
        return batch * self.channels * self.height * self.width


class Conv(NamedTuple):
    """A convolution without groups or dilation, padded by half its size."""

    inputs: int
    outputs: int
    size: int
    stride: int
    height: int  # of the input
    width: int

    def __str__(self) -> str:
        kernel, image = f"{self.size}x{self.size}/{self.stride}", f"{self.inputs}x{self.height}x{self.width}"
        return f"{kernel} {image} -> {self.outputs}"

    def planned(self, batch: int) -> plan.Conv:
        """The same of ``batch`` images, for counts of bytes and FLOP."""
        return plan.Conv(batch, self.inputs, self.height, self.width, self.outputs, self.size, self.stride)


class Block(NamedTuple):
    """A residual block: its input's channels and size, its ``planes``, stride and number of convolutions."""

    inputs: int
    planes: int
    stride: int
    height: int
    width: int
    depth: int

    @property
    def convolutions(self) -> tuple[tuple[int, int, int, int], ...]:
        """(channels in, channels out, kernel size, stride) of each."""
        inputs, planes = self.inputs, self.planes
        if self.depth == 2:
            return (inputs, planes, 3, self.stride), (planes, planes, 3, 1)
        return (inputs, planes, 1, 1), (planes, planes, 3, self.stride), (planes, 4 * planes, 1, 1)

    def planned(self, batch: int) -> nets.Block:
        """The same of ``batch`` images, for counts of bytes and FLOP."""
        convs, height, width = [], self.height, self.width
        for inputs, outputs, size, stride in self.convolutions:
            convs.append(plan.Conv(batch, inputs, height, width, outputs, size, stride))
            height, width = convs[-1].out_shape[2:]
        outputs = self.convolutions[-1][1]
        projection = None
        if self.stride != 1 or self.inputs != outputs:
            projection = plan.Conv(batch, self.inputs, self.height, self.width, outputs, 1, self.stride)
        return nets.Block("block", tuple(convs), projection)

    def output(self, batch: int) -> tuple[int, int, int, int]:
        size = ((side - 1) // self.stride + 1 for side in (self.height, self.width))
        return batch, self.convolutions[-1][1], *size

    def __str__(self) -> str:
        kind = "basic" if self.depth == 2 else "bottleneck"
        return f"{kind} {self.inputs}x{self.height}x{self.width} -> {self.convolutions[-1][1]}/{self.stride}"


def layers(model: str, image_size: int = IMAGE_SIZE) -> Counter[Norm | Conv]:
    """The distinct layers of ``model`` in the order of a forward pass, and how many there are of each."""
    found: Counter[Norm | Conv] = Counter()
    with torch.device("meta"):
        net, image = EagerResNet(model), torch.empty(1, 3, image_size, image_size)
    ends = {f"{name}.bn{block.depth}" for name, block in net.named_modules() if isinstance(block, EagerBlock)}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels, height, width = inputs[0].shape[1:]
        if isinstance(module, nn.Conv2d):
            size, stride = module.kernel_size[0], module.stride[0]
            found[Conv(channels, module.out_channels, size, stride, height, width)] += 1
        else:
            found[Norm(channels, height, width, name in ends, "downsample" not in name)] += 1

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_pre_hook(_named(see, name))
    net(image)
    return found


def _named(see: Any, name: str) -> Any:
    return lambda module, inputs: see(name, module, inputs)


def convs(models: Iterable[str], largest: int | None = None) -> list[Conv]:
    """The distinct convolutions of ``models`` behind the stem's.

    Args:
        models: names.
        largest: only so many of each model, those that together compute most.
    """
    chosen: dict[Conv, None] = {}
    for model in models:
        counts = {
            layer: n for layer, n in layers(model).items() if isinstance(layer, Conv) and layer.inputs > 3
        }
        by_size = sorted(counts, key=lambda conv: counts[conv] * traffic.flop(conv.planned(1)), reverse=True)
        chosen |= dict.fromkeys(by_size[:largest])
    return list(chosen)


def norms(models: Iterable[str], largest: int | None = None) -> list[Norm]:
    """The distinct batch norms of ``models``.

    Args:
        models: names.
        largest: only so many of each model, those that together move most memory.
    """
    chosen: dict[Norm, None] = {}
    for model in models:
        counts = {layer: count for layer, count in layers(model).items() if isinstance(layer, Norm)}
        by_size = sorted(counts, key=lambda norm: norm.values(counts[norm]), reverse=True)
        chosen |= dict.fromkeys(by_size[:largest])
    return list(chosen)


def blocks(models: Iterable[str], stages: Iterable[int] = range(1, 5)) -> list[Block]:
    """The distinct residual blocks of ``models``, in their order; of some stages, 1 to 4, alone."""
    found: dict[Block, None] = {}

    def see(module: Any, inputs: tuple[Tensor, ...]) -> None:
        channels, height, width = inputs[0].shape[1:]
        convs = [getattr(module, f"conv{i}") for i in range(1, module.depth + 1)]
        stride = max(conv.stride[0] for conv in convs)
        found[Block(channels, convs[0].out_channels, stride, height, width, module.depth)] = None

    for model in models:
        with torch.device("meta"):
            net, image = EagerResNet(model), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        for stage in stages:
            for block in getattr(net, f"layer{stage}"):
                block.register_forward_pre_hook(see)
        net(image)
    return list(found)


if __name__ == "__main__":
    for layer, count in layers(*sys.argv[1:2]).items():
        print(f"{count:>3} x {type(layer).__name__.lower():<5}{layer}")
