"""What the training loop asks of images, and the order in which it sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fusedres.training.normalise import Normalisation

Batches = Iterator[tuple[Tensor, Tensor]]


class DataError(ValueError):
    """There are no such images, or they can't be read; one line."""


def seed_of(*numbers: int) -> int:
    """A seed for a random generator, from what it is for."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Order:
    """The batches of an epoch, from the seed alone: a run that goes on sees what it would have seen.

    A batch is drawn for all processes; each takes its share. Images that fill no batch are left out of
    this epoch.

    Args:
        images: how many there are.
        batch: images in a step, over all processes.
        seed: of the run.
        epoch: from 0.
        first: the step to begin with.
        rank: of this process.
        processes: how many there are; divides ``batch``.
    """

    images: int
    batch: int
    seed: int
    epoch: int
    first: int = 0
    rank: int = 0
    processes: int = 1

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step the images [batch / processes] that this process takes, and a seed for each."""
        order = torch.randperm(self.images, generator=self._generator(0))
        seeds = torch.randint(2**62, (self.images,), generator=self._generator(1))
        for step in range(self.first, self.steps):
            share = slice(step * self.batch + self.rank, (step + 1) * self.batch, self.processes)
            yield order[share], seeds[share]

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, self.epoch, purpose))


def hold_out(images: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of the training images are kept, and which are held out; both in order.

    Raises:
        DataError: none are left to train on.
    """
    if count >= images:
        raise DataError(f"validation must be less than the {images:,} training images, got {count:,}")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed_of(seed)))
    return order[count:].sort().values, order[:count].sort().values


class Training(Protocol):
    """Images to train on, each time augmented anew."""

    def __len__(self) -> int: ...

    def batches(self, order: Order) -> Batches:
        """What ``order`` says: images [n, 3, H, W], fp32, normalised, channels_last, and labels [n]."""


class Testing(Protocol):
    """Images to test on."""

    def __len__(self) -> int: ...

    def batches(self, size: int, rank: int, processes: int) -> Batches:
        """This process' share, in batches of at most ``size``; as in :class:`Training`."""


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        train: to train on.
        validation: held out of the training images; None if none are.
        test: the test images.
        classes: their names.
        normalisation: of what the net reads.
        size: px, side of what the net reads in testing.
        resize: px, shorter side of a test image before the crop in its centre; None for no crop.
    """

    train: Training
    validation: Testing | None
    test: Testing
    classes: list[str]
    normalisation: Normalisation
    size: int
    resize: int | None
