"""The views of an image as pillow makes them, and their scores, one call of the net for each: an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedres

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resized(image: Any, shorter: int) -> Any:
    from PIL import Image

    width, height = image.size
    if width <= height:
        size = (shorter, int(shorter * height / width))
    else:
        size = (int(shorter * width / height), shorter)
    return image.resize(size, Image.Resampling.BILINEAR)


def one_crop(image: Any, size: int, shorter: int) -> list[Any]:
    image = resized(image, shorter)
    left, top = (int(round((side - size) / 2.0)) for side in image.size)
    return [image.crop((left, top, left + size, top + size))]


def ten_crops(image: Any, size: int, shorter: int) -> list[Any]:
    image = resized(image, shorter)
    width, height = image.size
    left, top = (int(round((side - size) / 2.0)) for side in image.size)
    corners = [(0, 0), (width - size, 0), (0, height - size), (width - size, height - size), (left, top)]
    crops = [image.crop((x, y, x + size, y + size)) for x, y in corners]
    return crops + [mirrored(crop) for crop in crops]


def whole(image: Any, scales: tuple[int, ...]) -> list[Any]:
    views = [resized(image, scale) for scale in scales]
    return views + [mirrored(view) for view in views]


def mirrored(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.mirror(image)


@torch.no_grad()
def logits(net: nn.Module, image: Any) -> Tensor:
    """[classes]"""
    x = torch.from_numpy(np.asarray(image).copy()).float().permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with fusedres.backend("reference"):
        return net(x)[0]


def mean_probabilities(net: nn.Module, views: list[Any]) -> Tensor:
    total = torch.zeros(net.fc.out_features)
    for view in views:
        total += logits(net, view).softmax(0)
    return total / len(views)
