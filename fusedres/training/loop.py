"""The training loop: SGD with momentum under a cosine schedule, tested after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fusedres.training import data, files
from fusedres.training.data import Split

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to."""

    number: int
    loss: float  # mean over the training images
    correct: int  # of the test images
    tested: int
    images_per_second: float  # of training

    @property
    def accuracy(self) -> float:
        return self.correct / self.tested


def fit(model: nn.Module, split: Split, *, epochs: int, batch: int, lr: float, seed: int) -> Iterator[Epoch]:
    """Train ``model``, yielding after every epoch.

    Args:
        model: [N, 3, H, W] -> [N, classes].
        split: the data.
        epochs: passes over the training images.
        batch: images in a step.
        lr: of the first step; falls to 0 by a cosine.
        seed: of the order of the images.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = math.ceil(len(split.train_labels) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps)
    for number in range(1, epochs + 1):
        model.train()
        total, start = 0.0, time.perf_counter()
        shuffled = data.batches(split.train_images, split.train_labels, batch, generator)
        for images, labels in tqdm(
            shuffled, total=steps, desc=f"epoch {number}/{epochs}", unit="step", disable=None, leave=False
        ):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total += loss.item() * len(labels)
        speed = len(split.train_labels) / (time.perf_counter() - start)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} in epoch {number}")
        correct = evaluate(model, split.test_images, split.test_labels, batch)
        yield Epoch(number, total / len(split.train_labels), correct, len(split.test_labels), speed)


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> int:
    """How many of the images ``model``, in evaluation mode, gets right."""
    model.eval()
    right = 0
    for inputs, targets in data.batches(images, labels, batch):
        right += int((model(inputs).argmax(1) == targets).sum())
    return right


def save(path: Path, model: nn.Module, **facts: Any) -> None:
    """A checkpoint that ``torch.load(weights_only=True)`` reads: the state_dict as "model", and facts."""
    with files.atomic(path) as temporary:
        torch.save({"model": model.state_dict(), **facts}, temporary)
