"""Images with one object at a known place: small pictures pasted on larger ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.training.normalise import IMAGENET

SIZE = 96  # of a canvas, pixels
SIDES = (24, 48)  # shortest and longest of an object


class Canvases(NamedTuple):
    """Images with an object each.

    Args:
        pixels: [N, 3, SIZE, SIZE], fp32, 0 to 1.
        boxes: [N, 4], fp32, the objects' x1, y1, x2, y2 in pixels.
        labels: [N], int64.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor

    @property
    def inputs(self) -> Tensor:
        """Normalised, channels_last."""
        return IMAGENET(self.pixels).contiguous(memory_format=torch.channels_last)

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        return [
            {"boxes": box[None], "labels": label[None]}
            for box, label in zip(self.boxes, self.labels, strict=True)
        ]


def make(images: Tensor, labels: Tensor, index: Tensor, generator: torch.Generator) -> Canvases:
    """Each image once on a canvas: stretched, perhaps mirrored, in front of another image that fills it.

    Args:
        images: [M, h, w, 3], uint8, to choose backgrounds from, too.
        labels: [M], of the images.
        index: [N], which of them are the objects.
        generator: of places, sizes, mirroring and backgrounds.
    """

    def integers(low: int | Tensor, high: int | Tensor) -> Tensor:
        """From ``low`` to ``high``, both included, for each canvas."""
        part = torch.rand(len(index), generator=generator)
        return (low + part * (high - low + 1)).long()

    sides = torch.stack([integers(*SIDES), integers(*SIDES)], dim=1)
    corners = torch.stack([integers(0, SIZE - sides[:, i]) for i in (0, 1)], dim=1)
    mirrored = integers(0, 1).bool()
    behind = integers(0, len(images) - 1)
    pixels = _resized(images[behind], SIZE, SIZE)
    for n, (i, (w, h), (x, y)) in enumerate(
        zip(index.tolist(), sides.tolist(), corners.tolist(), strict=True)
    ):
        item = images[i].flip(1) if mirrored[n] else images[i]
        pixels[n, :, y : y + h, x : x + w] = _resized(item[None], h, w)[0]
    return Canvases(pixels, torch.cat([corners, corners + sides], dim=1).float(), labels[index])


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    """[N, h, w, 3], uint8 -> [N, 3, height, width], fp32, 0 to 1."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
