"""Trained weights and real images, where FUSEDRES_DATA has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

WEIGHTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}


def trained(data: Path, depth: int) -> dict[str, Tensor]:
    state = torch.load(data / WEIGHTS[depth], weights_only=True, map_location="cpu")["state_dict"]
    return {k.removeprefix("module.").replace("linear.", "fc."): v for k, v in state.items()}


def images(data: Path, name: str) -> tuple[Tensor, Tensor]:
    numpy = pytest.importorskip("numpy")
    with numpy.load(data / name) as arrays:
        pixels, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    x = pixels.permute(0, 3, 1, 2).float().contiguous() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), labels.long()
