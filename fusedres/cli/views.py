"""The views of an image that a net scores: sizes, crops and mirror images, in uint8 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusedres.cli.errors import require
from fusedres.training.normalise import Normalisation

Pixels = npt.NDArray[np.uint8]
SCALES = (224, 256, 384, 480, 640)  # He et al. 2015, section 3.4
FLIPPED = 2  # views that an image and its mirror image make


class Format(NamedTuple):
    """What a net reads: square images of ``size`` px.

    An image is resized to ``shorter`` px on its shorter side and cropped in the centre; with None it is
    resized to the square.
    """

    size: int
    shorter: int | None

    def of_size(self, size: int) -> Format:
        """For crops of ``size`` px, with the shorter side in proportion."""
        return Format(size, self.shorter and round(self.shorter * size / self.size))


IMAGENET, CIFAR = Format(224, 256), Format(32, None)


@dataclass(frozen=True)
class Protocol:
    """Which views of an image are scored.

    Args:
        crops: "1", the crop in the centre; "10", those in the corners, too, and the mirror images of all
            (Krizhevsky et al. 2012); "full", the whole image.
        format: of crops.
        scales: of whole images, px of the shorter side.
        flip: whether each view's mirror image is scored, too.
    """

    crops: str
    format: Format
    scales: tuple[int, ...]
    flip: bool

    def views(self, pixels: Pixels) -> list[Tensor]:
        """[3, h, w], uint8, for every view but the mirror images; pixels: [H, W, 3]."""
        if self.crops == "full":
            return [planes(resize(pixels, scale)) for scale in self.scales]
        image = planes(sized(pixels, self.format))
        if self.crops == "1":
            return [centre(image, self.format.size)]
        return five_crops(image, self.format.size)

    def per_image(self) -> int:
        """Views of an image, with the mirror images."""
        views = {"1": 1, "10": 5, "full": len(self.scales)}[self.crops]
        return views * (FLIPPED if self.flip else 1)


def sized(pixels: Pixels, format: Format) -> Pixels:
    """[H, W, 3] -> [h, w, 3]: what crops of ``format`` are taken from"""
    size, shorter = format
    return _resize(pixels, size, size) if shorter is None else resize(pixels, shorter)


def resize(pixels: Pixels, shorter: int) -> Pixels:
    """[H, W, 3] -> [h, w, 3], min(h, w) = shorter; the longer side is rounded down."""
    sides = pixels.shape[:2]
    height, width = (shorter * side // min(sides) for side in sides)
    return _resize(pixels, height, width)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """[H, W, 3] -> [height, width, 3], bilinear, with as many pixels as each of the result covers."""
    if pixels.shape[:2] == (height, width):
        return pixels
    Image = require("PIL.Image", "resizing images", "pillow")
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def planes(pixels: Pixels) -> Tensor:
    """[H, W, 3] -> [3, H, W], uint8"""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def centre(image: Tensor, size: int) -> Tensor:
    """[3, H, W] -> [3, size, size]"""
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def five_crops(image: Tensor, size: int) -> list[Tensor]:
    """The four corners and the centre: [3, H, W] -> 5 of [3, size, size]"""
    corners = [image[:, rows, columns] for rows in _ends(size) for columns in _ends(size)]
    return [*corners, centre(image, size)]


def _ends(size: int) -> tuple[slice, slice]:
    return slice(None, size), slice(-size, None)


def with_flips(views: Tensor) -> Tensor:
    """Views and their mirror images: [N, C, H, W] -> [2N, C, H, W]"""
    return torch.cat([views, views.flip(3)])


def normalised(views: Tensor, normalise: Normalisation) -> Tensor:
    """What the net reads: [N, 3, H, W], uint8 -> fp32, channels_last"""
    return normalise(views.float() / 255).contiguous(memory_format=torch.channels_last)
