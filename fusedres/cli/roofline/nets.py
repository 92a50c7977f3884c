"""The convolutions of a ResNet, block by block: shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from fusedres.plan import Conv

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
BASIC = ("resnet18", "resnet34")
CLASSES = 1000


class Block(NamedTuple):
    """A residual block.

    Args:
        name: of the module.
        convs: in order.
        projection: of the shortcut, if it isn't the identity.
    """

    name: str
    convs: tuple[Conv, ...]
    projection: Conv | None


class Net(NamedTuple):
    """A net for images of one size: the stem's convolution, the blocks, classes from features."""

    stem: Conv
    blocks: tuple[Block, ...]
    features: int
    classes: int = CLASSES

    @property
    def convs(self) -> list[Conv]:
        return [self.stem, *(conv for block in self.blocks for conv in _of(block))]

    @property
    def weights(self) -> int:
        """Without the batch norms'."""
        convs = sum(conv.filters * conv.channels * conv.side**2 for conv in self.convs)
        return convs + self.features * self.classes


def _of(block: Block) -> tuple[Conv, ...]:
    return block.convs if block.projection is None else (*block.convs, block.projection)


def net(model: str, batch: int, image_size: int) -> Net:
    """ResNet-18 to 152, v1.5, for ``batch`` images of ``image_size`` pixels a side."""
    stem = Conv(batch, 3, image_size, image_size, 64, 7, 2)
    size = _half(_half(image_size))
    channels, blocks = stem.filters, []
    for stage, depth in enumerate(DEPTHS[model]):
        width = 64 << stage
        outputs = width if model in BASIC else 4 * width
        for index in range(depth):
            stride = 2 if stage and not index else 1
            name = f"layer{stage + 1}.{index}"
            blocks.append(_block(name, model in BASIC, batch, size, channels, width, outputs, stride))
            size, channels = (_half(size) if stride == 2 else size), outputs
    return Net(stem, tuple(blocks), channels)


def _block(
    name: str, basic: bool, batch: int, size: int, channels: int, width: int, outputs: int, stride: int
) -> Block:
    smaller = _half(size) if stride == 2 else size
    convs: tuple[Conv, ...]
    if basic:
        convs = (
            Conv(batch, channels, size, size, width, 3, stride),
            Conv(batch, width, smaller, smaller, width, 3, 1),
        )
    else:
        convs = (
            Conv(batch, channels, size, size, width, 1, 1),
            Conv(batch, width, size, size, width, 3, stride),
            Conv(batch, width, smaller, smaller, outputs, 1, 1),
        )
    projected = channels != outputs or stride != 1
    projection = Conv(batch, channels, size, size, outputs, 1, stride) if projected else None
    return Block(name, convs, projection)


def _half(size: int) -> int:
    """Of what a window of stride 2 gives, padded to see every pixel."""
    return (size - 1) // 2 + 1
