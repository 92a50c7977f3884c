"""Two real photographs, of a temple and of a flower, as scikit-learn has them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def photographs(height: int = 48, width: int = 64) -> Tensor:
    """[2, 3, height, width], fp32, 0 to 1."""
    pytest.importorskip("sklearn", exc_type=ImportError)
    found = importlib.import_module("sklearn.datasets").load_sample_images().images
    x = torch.stack([torch.tensor(image) for image in found]).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)


def classifier(name: str, **arguments: Any) -> nn.Module:
    """torchvision's classifier with batch norms as of a trained net.

    They have the statistics of the photographs, and small weights at the end of a block: else activations
    grow from block to block.
    """
    models = importlib.import_module("torchvision.models")
    net: nn.Module = getattr(models, name)(num_classes=10, **arguments)
    last = "bn3" if hasattr(net.layer1[0], "bn3") else "bn2"  # type: ignore[index]
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.momentum = None
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if name.endswith(last) else (0.5, 1)))
        nn.init.normal_(norm.bias, std=0.1)
    with torch.no_grad():
        net.train()(photographs())
    for norm in norms.values():
        norm.momentum = 0.1
    return net


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the error, relative to what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
