"""A small folder of images, as ImageNet's, and what is read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusedres.training import recipe
from fusedres.training.data import Data, Loader, Order, open_data

CLASSES = ("ant", "bee", "cat")
CPU = torch.device("cpu")

Batch = tuple[torch.Tensor, torch.Tensor]


def write_pictures(folder: Path, *suffixes: str) -> Path:
    """Smooth pictures of several sizes: 4 a class to train on, 2 to test on, in these formats by turns."""
    numpy, Image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=numpy.uint8))
                picture = small.resize((60 + 8 * number, 48), Image.Resampling.BICUBIC)
                picture.save(folder / part / name / f"{number}{suffixes[number % len(suffixes)]}")
    return folder


def opened(
    folder: Path,
    readers: int = 0,
    loader: Loader = "torchvision",
    device: torch.device = CPU,
    **changes: Any,
) -> Data:
    augmentation = {"shorter": [36, 60], "crop": 32, "test_shorter": 36} | changes
    found = recipe.load("imagenet-paper", {f"augmentation.{k}": v for k, v in augmentation.items()})
    return open_data(str(folder), found, 0, device, readers, loader)


def batches(data: Data, epoch: int = 0, first: int = 0, **others: int) -> list[Batch]:
    return list(data.train.batches(Order(len(data.train), 4, 0, epoch, first, **others)))
