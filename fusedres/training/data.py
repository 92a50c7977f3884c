"""Data sets as tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS_SIZE = 16
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Images [N, 3, H, W], fp32, normalised, channels_last; labels [N], int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int) -> Split:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, 10 classes.

    A fifth, the same share of every class, is for testing. Pixels are scaled to 16x16, repeated in
    three channels, and normalised by the mean and deviation of the training images.

    Args:
        seed: of the split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None]
    images = F.interpolate(images, size=DIGITS_SIZE, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    train, test = (
        torch.from_numpy(part)
        for part in train_test_split(
            torch.arange(len(labels)).numpy(), test_size=TEST_SHARE, stratify=data.target, random_state=seed
        )
    )
    mean, std = images[train].mean(), images[train].std()
    images = ((images - mean) / std).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return Split(images[train], labels[train], images[test], labels[test])


def batches(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most ``size``, in the order given or, with a generator, shuffled."""
    if generator is None:
        order = torch.arange(len(labels))
    else:
        order = torch.randperm(len(labels), generator=generator)
    for index in torch.split(order, size):
        yield images[index].contiguous(memory_format=torch.channels_last), labels[index]
