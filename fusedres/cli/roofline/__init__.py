"""What a net moves and computes at each level of fusion, pass by pass, and the least time that takes.

Only full tensors are counted, each as often as a pass reads or writes it, as if caches held nothing from one
pass to the next; pointwise arithmetic is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedres.cli.roofline import fused, inference, nets, unfused
from fusedres.cli.roofline.tally import Placed, Tally

__all__ = ["LEVELS", "Level", "Placed", "block_passes", "passes"]

Fill = Callable[[Tally], None]


class Level(NamedTuple):
    """How much is fused.

    Args:
        mode: "train" or "inference".
        title: in a table.
        built: whether this package, or for the unfused ones PyTorch, runs so.
        fill: adds its passes to a tally.
    """

    mode: str
    title: str
    built: bool
    fill: Fill


def _training(make: Callable[[Tally], unfused.Eager | fused.Blocks]) -> Fill:
    def fill(tally: Tally) -> None:
        net = make(tally)
        net.forward()
        net.backward()
        tally.step()

    return fill


LEVELS = {
    "eager": Level("train", "eager", True, _training(lambda t: unfused.Eager(t, training=True))),
    "compile": Level(
        "train", "pointwise fused, as compilers do", True, _training(lambda t: unfused.Compiled(t, True))
    ),
    "dbn": Level("train", "dBN separate", False, _training(lambda t: fused.Blocks(t, separate=True))),
    "block": Level("train", "block Functions", True, _training(fused.Blocks)),
    "across": Level("train", "Pending across blocks", False, _training(fused.Across)),
    "joint": Level("train", "joint dgrad + wgrad", False, _training(fused.Joint)),
    "eager-inference": Level(
        "inference", "eager", True, lambda t: unfused.Eager(t, training=False).forward()
    ),
    "conv-pool": Level(
        "inference", "per conv, pool apart", True, lambda t: inference.Convs(t, pooled=False).forward()
    ),
    "conv": Level("inference", "per conv", False, lambda t: inference.Convs(t, pooled=True).forward()),
    "block-inference": Level(
        "inference", "per block", False, lambda t: inference.WholeBlocks(t, pooled=True).forward()
    ),
}


def passes(level: str, model: str, batch: int, image_size: int, dtype: str) -> list[Placed]:
    """Every pass of one step, in order.

    Args:
        level: of LEVELS.
        model: "resnet18" to "resnet152".
        batch: images in a step.
        image_size: pixels a side.
        dtype: of activations, "float32", "bfloat16" or "float16".
    """
    tally = Tally(nets.net(model, batch, image_size), dtype)
    LEVELS[level].fill(tally)
    return tally.passes


def block_passes(block: nets.Block, dtype: str, backward: bool) -> list[Placed]:
    """The passes of a block by itself, as one Function, in training.

    Args:
        block: of any size.
        dtype: of activations, "float32", "bfloat16" or "float16".
        backward: with the backward's.
    """
    tally = Tally(nets.Net(block.convs[0], (block,), 0), dtype)
    tally.block = block.name
    level = fused.Blocks(tally)
    level.block_forward(block, None)
    if backward:
        tally.backward = True
        level.block_backward(block, None)
    return tally.passes
