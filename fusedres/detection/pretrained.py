"""Where detectors get their nets and weights. torchvision is imported on first use: it takes a second."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from fusedres.models import resnet
from fusedres.nn import FrozenBatchNorm2d, NormLayer

_NETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_TRAINABLE = 3  # layers of a pretrained trunk that go on training, by default


def torchvision(name: str) -> ModuleType:
    """The module ``torchvision.<name>``.

    Raises:
        ImportError: there is no torchvision.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ImportError as error:
        raise ImportError("detectors need torchvision: pip install torchvision") from error


def make_net(name: str, weights: Any = None, progress: bool = True, **arguments: Any) -> resnet.ResNet:
    """A ResNet by its name.

    Args:
        name: "resnet18" to "resnet152".
        weights: of the classifier, as :func:`fusedres.resnet18` takes them.
        progress: show the download's progress.
        arguments: more of :class:`fusedres.models.resnet.ResNet`.

    Raises:
        ValueError: another name, or weights that there aren't.
    """
    if name not in _NETS:
        raise ValueError(f"net must be one of {', '.join(_NETS)}, got {name!r}")
    return getattr(resnet, name)(weights=weights, progress=progress, **arguments)  # type: ignore[no-any-return]


def fine_tuning(
    pretrained: bool, norm_layer: NormLayer | None, trainable_layers: int | None
) -> tuple[NormLayer, int]:
    """The norm of a trunk, and how many of its layers train, where the user leaves them open.

    Args:
        pretrained: whether the trunk starts from trained weights: then its batch norms are fixed and its
            first layers are kept, as by torchvision; else all of it trains.
        norm_layer: the user's; None for that default.
        trainable_layers: likewise.
    """
    if norm_layer is None:
        norm_layer = FrozenBatchNorm2d if pretrained else nn.BatchNorm2d
    if trainable_layers is None:
        trainable_layers = _TRAINABLE if pretrained else 5
    return norm_layer, trainable_layers


def find_weights(weights: Any, model: str, num_classes: int | None, default: int) -> tuple[Any, int]:
    """The member of the weights enum of torchvision's ``model`` that is meant, and the number of classes.

    Args:
        weights: a member or its name; None for none.
        model: the function of torchvision that has the weights.
        num_classes: the user's; None for the weights' or, without any, ``default``.
        default: that number.

    Raises:
        ValueError: there are no such weights, or they have another number of classes.
    """
    if weights is None:
        return None, default if num_classes is None else num_classes
    if model not in torchvision("models").list_models():
        raise ValueError(f"weights must be None, torchvision has none of {model}, got {weights!s}")
    found = resnet.find_weights(weights, model)
    classes = len(found.meta["categories"])
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes must be {classes} with weights={found}, got {num_classes}")
    return found, classes


def load(model: nn.Module, weights: Any, progress: bool) -> None:
    """Load the weights that :func:`find_weights` found, if any."""
    if weights is None:
        return
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    if weights.name == "COCO_V1":  # trained where a fixed batch norm had no eps, as torchvision's do
        for module in model.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.eps = 0.0  # type: ignore[assignment]
