"""What the paper reports, with its source: error rates in percent (He et al. 2015)."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    """A figure of the paper.

    Args:
        error: percent.
        source: the table.
    """

    error: float
    source: str


# table 6, CIFAR-10 test error; 110 layers: the best of five runs
CIFAR = {
    "resnet20": Reported(8.75, "table 6"),
    "resnet32": Reported(7.51, "table 6"),
    "resnet44": Reported(7.17, "table 6"),
    "resnet56": Reported(6.97, "table 6"),
    "resnet110": Reported(6.43, "table 6, best of 5"),
    "resnet1202": Reported(7.93, "table 6"),
}

# top-1 error on ImageNet's validation images, 10 crops
IMAGENET_10_CROP = {
    "plain18": Reported(27.94, "table 2"),
    "plain34": Reported(28.54, "table 2"),
    "resnet18": Reported(27.88, "table 2, shortcut A"),
    "resnet34": Reported(25.03, "table 2, shortcut A"),
    "resnet34 A": Reported(25.03, "table 3"),
    "resnet34 B": Reported(24.52, "table 3"),
    "resnet34 C": Reported(24.19, "table 3"),
}
