"""Training a localizer on small images pasted on larger canvases (He et al. 2015, appendix C)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedres.cli.experiment import canvases
from fusedres.cli.experiment.canvases import Canvases
from fusedres.detection import Localizer, Prediction, Trunk, localized, mean_iou
from fusedres.models.resnet import Network

ANCHORS = (28, 40)
HIDDEN = 128
POSITIVE_IOU = 0.5  # a square overlaps with an object twice as long as wide by 0.55 at most
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4
WARM_UP = 0.05  # of the training
RECORDS = 16


@dataclass(frozen=True)
class Record:
    """Where a training stands.

    Attributes:
        step: how many steps were made.
        seconds: since the start, tests included.
        loss_class: mean since the last record.
        loss_box: likewise.
        class_error: the part of test images whose best guess is of another class.
        box_error: the part of test images where the box of the right class overlaps by less than 0.5.
        localization_error: the part where the best guess is of another class or overlaps by less than 0.5.
        mean_iou: of the box of the right class with the object.
    """

    step: int
    seconds: float
    loss_class: float
    loss_box: float
    class_error: float
    box_error: float
    localization_error: float
    mean_iou: float


def make_model(net: Network, num_classes: int) -> Localizer:
    """A localizer on a CIFAR ResNet, whose features have stride 4; the net's classifier isn't used."""
    trunk = Trunk(net, {"layer3": "features"})
    model = Localizer(trunk, num_classes, ANCHORS, hidden_channels=HIDDEN, positive_iou=POSITIVE_IOU)
    return model.to(memory_format=torch.channels_last)


def train(
    model: Localizer,
    images: Tensor,
    labels: Tensor,
    test: Canvases,
    *,
    seconds: float,
    steps: int | None = None,
    batch: int = 32,
    records: int = RECORDS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Record]:
    """Train with SGD under a cosine schedule, until the time or the steps are used up.

    Args:
        model: what is trained.
        images: [N, h, w, 3], uint8, the objects.
        labels: [N], int64, their classes.
        test: what every record is tested on.
        seconds: of time, tests included.
        steps: at most; None for as many as there is time for.
        batch: canvases in a step.
        records: how many are given on the way, evenly over the training; one of the beginning is added.
        seed: of the canvases and the drawn anchors.
        dtype: of the convolutions: fp32, or bf16 by autocast.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    step, given, totals = 0, 0, torch.zeros(2)
    yield Record(0, time.perf_counter() - start, math.nan, math.nan, **evaluate(model, test))
    since = 0
    while given < records:
        progress = (time.perf_counter() - start) / seconds
        if steps is not None:
            progress = max(progress, step / steps)
        if since and progress >= (given + 1) / records:
            means = (totals / since).tolist()
            given, since, totals = int(min(progress, 1) * records), 0, torch.zeros(2)
            yield Record(step, time.perf_counter() - start, means[0], means[1], **evaluate(model, test))
            continue
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(progress)
        index = torch.randint(len(images), (batch,), generator=generator)
        drawn = canvases.make(images, labels, index, generator)
        model.train()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = torch.stack(list(model.losses(drawn.inputs, drawn.targets, generator).values()))
        optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found = losses.detach()
        if not found.isfinite().all():
            raise FloatingPointError(f"the loss is {found.sum()} at step {step}")
        totals += found
        step, since = step + 1, since + 1


def _learning_rate(progress: float) -> float:
    """Rises, then falls to 0 by a cosine, as ``progress`` goes from 0 to 1."""
    return LR * min(1, 0.02 + progress / WARM_UP) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def evaluate(model: Localizer, test: Canvases, batch: int = 50) -> dict[str, float]:
    """The errors and the mean_iou of a :class:`Record`."""
    every = predict(model, test, batch)
    best = Prediction(*(field[:, :1] for field in every))
    of_object = every.classes == test.labels[:, None]
    known = Prediction(*(field[of_object][:, None] for field in every))
    return {
        "class_error": float((best.classes[:, 0] != test.labels).float().mean()),
        "box_error": 1 - float(localized(known, test.targets).float().mean()),
        "localization_error": 1 - float(localized(best, test.targets).float().mean()),
        "mean_iou": mean_iou(known, test.targets),
    }


def predict(model: Localizer, test: Canvases, batch: int = 50) -> Prediction:
    """A guess for each class on every canvas, the best first."""
    model.eval()
    parts = [model.predict(x, top=model.num_classes) for x in torch.split(test.inputs, batch)]
    return Prediction(*(torch.cat(field) for field in zip(*parts, strict=True)))
