"""Small images of one size, held in memory and augmented a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.training.data.images import Batches, DataError, Order
from fusedres.training.normalise import Mean, Normalisation, measure
from fusedres.training.recipe import Augmentation

_BATCH = 1000  # images at a time, for their mean


@dataclass(frozen=True)
class Pixels:
    """Images and their classes.

    Args:
        images: [N, H, W, 3], uint8.
        labels: [N], int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Pixels:
        return Pixels(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Pixels:
        return Pixels(self.images.to(device), self.labels.to(device))

    def values(self, index: Tensor | slice) -> Tensor:
        """[n, 3, H, W], fp32, from 0 to 1, channels_last"""
        return self.images[index].permute(0, 3, 1, 2).float() / 255


def normalisation(pixels: Pixels, mean: Mean) -> Normalisation:
    """That of these images; see :func:`fusedres.training.normalise.measure`."""
    parts = range(0, len(pixels), _BATCH)
    return measure((pixels.values(slice(start, start + _BATCH)) for start in parts), mean)


def pad_crop_flip(images: Tensor, size: int, pad: int, flip: bool, seeds: Tensor) -> Tensor:
    """A random crop of every padded image, half of them mirrored (He et al. 2015, section 4.2).

    Args:
        images: [N, C, H, W].
        size: px of the crop.
        pad: px of zeros on every side.
        flip: whether half of the images are mirrored.
        seeds: [N], int64, at random: what is drawn for an image depends on its own alone.

    Returns:
        [N, C, size, size], channels_last
    """
    device = images.device
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    # three numbers that don't overlap in the bits of a seed
    tops = (seeds & 0xFFFFF) % (padded.shape[1] - size + 1)
    lefts = (seeds >> 20 & 0xFFFFF) % (padded.shape[2] - size + 1)
    mirrored = (seeds >> 40 & 1).bool() & flip
    steps = torch.arange(size)
    rows = tops[:, None] + steps
    columns = lefts[:, None] + torch.where(mirrored[:, None], size - 1 - steps, steps)
    index = (torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded[tuple(i.to(device) for i in index)].permute(0, 3, 1, 2)


class TrainingPixels:
    """Pixels to train on; see :class:`fusedres.training.data.Training`.

    Raises:
        DataError: an augmentation that small images don't have, or a crop larger than what is padded.
    """

    def __init__(self, pixels: Pixels, augmentation: Augmentation, normalise: Normalisation) -> None:
        for name in ("shorter", "area", "colour", "test_shorter", "test_crop"):
            if getattr(augmentation, name):
                raise DataError(f"augmentation.{name} is for folders of images, not for images in memory")
        self.pixels, self.augmentation, self.normalise = pixels, augmentation, normalise
        height, width = pixels.images.shape[1:3]
        crop = augmentation.crop or height
        if height != width and not augmentation.crop and augmentation.flip:
            raise DataError(f"augmentation.crop is needed for images of {height}x{width} px")
        if crop > min(height, width) + 2 * augmentation.pad:
            raise DataError(
                f"augmentation.crop must be at most {min(height, width) + 2 * augmentation.pad} for images "
                f"of {height}x{width} px padded by {augmentation.pad}, got {crop}"
            )
        self.size = crop

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, order: Order) -> Batches:
        for index, seeds in order.batches():
            index = index.to(self.pixels.labels.device)
            images = self.normalise(self.pixels.values(index))
            augmentation = self.augmentation
            if augmentation.crop or augmentation.flip:
                images = pad_crop_flip(images, self.size, augmentation.pad, augmentation.flip, seeds)
            yield images.contiguous(memory_format=torch.channels_last), self.pixels.labels[index]


class TestingPixels:
    """Pixels to test on, whole; see :class:`fusedres.training.data.Testing`."""

    def __init__(self, pixels: Pixels, normalise: Normalisation) -> None:
        self.pixels, self.normalise = pixels, normalise

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, size: int, rank: int, processes: int) -> Batches:
        own = torch.arange(rank, len(self), processes, device=self.pixels.labels.device)
        for index in torch.split(own, size):
            images = self.normalise(self.pixels.values(index))
            yield images.contiguous(memory_format=torch.channels_last), self.pixels.labels[index]
