"""What the net reads of an image: drawn from the image's seed alone, whatever reads the file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedres.training.data.images import DataError
from fusedres.training.recipe import Augmentation

# of the colours of ImageNet's pixels from 0 to 1 (Krizhevsky et al. 2012, section 4.1)
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

RATIO = (3 / 4, 4 / 3)  # of the width to the height of a random area (Szegedy et al. 2015)
LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
TRIES = 10  # to find an area that fits into the image


class View(NamedTuple):
    """A crop of a part of an image that is resized; all in px, height or top first.

    Args:
        start: top left corner of the part.
        shape: of the part.
        resized: what the part is resized to.
        corner: top left corner of the crop in that; what lies outside is 0.
        mirror: whether left and right change places.
        shift: of red, green and blue, from 0 to 1.
    """

    start: tuple[int, int]
    shape: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    mirror: bool = False
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)


# of an image of a height and a width, with a seed
Viewer = Callable[[int, int, int], View]


def training(augmentation: Augmentation) -> Viewer:
    """Draws as torchvision's RandomShortestSize and RandomCrop, or RandomResizedCrop, and flip do.

    Raises:
        DataError: without a crop images have no common size.
    """
    if augmentation.crop is None:
        raise DataError("augmentation.crop must be given for folders of images")
    return functools.partial(_draw, augmentation, augmentation.crop)


def testing(size: int, resize: int | None) -> Viewer:
    """The crop of ``size`` in the centre, of an image whose shorter side is ``resize``."""
    return functools.partial(_centre, size, resize or size)


def _centre(size: int, resize: int, height: int, width: int, seed: int) -> View:
    resized = _with_shorter(resize, height, width)
    top, left = (round((side - size) / 2) for side in resized)
    return View((0, 0), (height, width), resized, (top, left))


def _draw(augmentation: Augmentation, crop: int, height: int, width: int, seed: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    corner = (0, 0)
    if augmentation.area:
        start, shape = _area(augmentation.area, height, width, generator)
        resized = (crop, crop)
    else:
        start, shape = (0, 0), (height, width)
        least, most = augmentation.shorter or (max(crop, augmentation.test_shorter or 0),) * 2
        resized = _with_shorter(least + _below(most - least + 1, generator), height, width)
        rooms = [side + 2 * augmentation.pad - crop for side in resized]
        top, left = (_below(room + 1, generator) - augmentation.pad if room else 0 for room in rooms)
        corner = (top, left)
    mirror = augmentation.flip and float(torch.rand((), generator=generator)) < 0.5
    shift = (0.0, 0.0, 0.0)
    if augmentation.colour:
        weights = torch.randn(3, generator=generator) * augmentation.colour
        shift = tuple((EIGENVECTORS @ (weights * EIGENVALUES)).tolist())
    return View(start, shape, resized, corner, mirror, shift)


def _with_shorter(shorter: int, height: int, width: int) -> tuple[int, int]:
    """The size of an image whose shorter side becomes ``shorter``."""
    if height < width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _area(
    share: tuple[float, float], height: int, width: int, generator: torch.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The top left corner and the shape of a random part of an image."""
    for _ in range(TRIES):
        area = height * width * _between(*share, generator)
        ratio = math.exp(_between(*LOG_RATIO, generator))
        shape = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < shape[0] <= height and 0 < shape[1] <= width:
            return (
                _below(height - shape[0] + 1, generator),
                _below(width - shape[1] + 1, generator),
            ), shape
    shape = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return ((height - shape[0]) // 2, (width - shape[1]) // 2), shape


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return float(torch.empty(()).uniform_(low, high, generator=generator))
