"""Networks by the names that recipes and the command line use."""

from __future__ import annotations

from fusedres.models.cifar import CifarResNet
from fusedres.models.plain import PlainNet18, PlainNet34
from fusedres.models.resnet import (
    Network,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    Shortcut,
)
from fusedres.nn import Variant, Zeros

RESNETS: dict[str, type[ResNet]] = {
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
}
PLAIN = {"plain18": PlainNet18, "plain34": PlainNet34}
CIFAR = {
    f"{kind}{depth}": depth for kind in ("resnet", "plain") for depth in (8, 14, 20, 32, 44, 56, 110, 1202)
}
NAMES = (*RESNETS, *PLAIN, *CIFAR)


def build(
    name: str,
    num_classes: int,
    *,
    shortcut: Shortcut | None = None,
    zeros: Zeros = "end",
    variant: Variant = "v1.5",
) -> Network:
    """A network with weights at random.

    Args:
        name: one of ``NAMES``.
        num_classes: outputs of the classifier.
        shortcut: None for the paper's main choice, "B" for ImageNet's nets and "A" for CIFAR's.
        zeros: where a CIFAR net's shortcuts have their zero channels.
        variant: where a bottleneck of ImageNet's nets has its stride.

    Raises:
        ValueError: an unknown name, or an argument that the net doesn't have.
    """
    if name in RESNETS:
        return RESNETS[name](num_classes, shortcut=shortcut or "B", variant=variant)
    if name not in NAMES:
        raise ValueError(f"the net must be one of {', '.join(NAMES)}, got {name!r}")
    plain = name.startswith("plain")
    if plain and shortcut is not None:
        raise ValueError(f"{name} is a plain net, without shortcuts, got shortcut {shortcut!r}")
    if plain and name in PLAIN:
        return PLAIN[name](num_classes)
    return CifarResNet(
        CIFAR[name], shortcut=shortcut or "A", plain=plain, zeros=zeros, num_classes=num_classes
    )
