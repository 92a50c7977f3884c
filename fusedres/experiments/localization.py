"""Localization on CIFAR images pasted on a larger canvas: He et al. 2015, appendix C, in minutes on a CPU."""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusedres.detection import Localizer, Prediction, Trunk, localized, mean_iou
from fusedres.experiments import canvases
from fusedres.experiments.canvases import Canvases
from fusedres.models.cifar import CifarResNet
from fusedres.training import files

ANCHORS = (28, 40)
HIDDEN = 128
POSITIVE_IOU = 0.5  # a square overlaps with an object twice as long as wide by 0.55 at most
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4
WARM_UP = 0.05  # of the training
RECORDS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HELD_OUT = 400  # canvases that are tested on


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


def make_model(net: CifarResNet, num_classes: int) -> Localizer:
    """A localizer on a CIFAR ResNet, whose features have stride 4; the net's classifier isn't used."""
    trunk = Trunk(net, {"layer3": "features"})
    model = Localizer(trunk, num_classes, ANCHORS, hidden_channels=HIDDEN, positive_iou=POSITIVE_IOU)
    return model.to(memory_format=torch.channels_last)


def load_net(path: Path, depth: int) -> CifarResNet:
    """A CIFAR ResNet with weights from a file.

    Args:
        path: a state_dict by torch.save, or one under "state_dict" or "model"; what it says under "net"
            about the place of the zero channels is followed, else they are split.
        depth: of the net.

    Raises:
        OSError: the file can't be read.
        ValueError: it has no such weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        facts = content.get("net")
        zeros = facts.get("zeros") if isinstance(facts, dict) else None
        net = CifarResNet(depth, zeros=zeros or "split")
        state = content.get("state_dict", content.get("model", content))
        state = {key.removeprefix("module."): value for key, value in state.items()}
        # its classifier may have another number of classes
        state = {key: value for key, value in state.items() if not key.startswith(("fc.", "linear."))}
        net.load_state_dict(state | {f"fc.{key}": value for key, value in net.fc.state_dict().items()})
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} has no weights of a ResNet-{depth}: {reason[:200]}") from error
    return net


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="NPZ",
        help="the objects: images [N, 32, 32, 3], uint8, and labels [N], as of CIFAR-10",
    )
    parser.add_argument(
        "--test", type=Path, metavar="NPZ", help="objects to test on (default: the last tenth of --data)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a CIFAR ResNet trained to classify, to start from (default: start from random weights)",
    )
    parser.add_argument("--depth", type=int, default=20, metavar="N", help="of the ResNet (default: 20)")
    parser.add_argument(
        "--budget", type=float, default=10, metavar="MINUTES", help="of wall time (default: 10)"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="canvases a step (default: 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast (default: fp32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="localization.csv and localization.png go there; DIR is made if it doesn't exist",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print, and write the table and the picture; the exit status."""
    try:
        _run(args)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        print(f"fusedres: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    try:
        plot = importlib.import_module("fusedres.experiments.localization_plot")
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from error
    for name in ("budget", "batch"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(exist_ok=True)
    outputs = [args.out / f"localization.{kind}" for kind in ("csv", "png")]
    for path in outputs:
        files.check_writable(path)
    images, labels = read(args.data)
    if args.test is None:
        cut = len(images) - max(1, len(images) // 10)
        others = images[cut:], labels[cut:]
        images, labels = images[:cut], labels[:cut]
    else:
        others = read(args.test)
    torch.manual_seed(args.seed)
    index = torch.arange(min(HELD_OUT, len(others[0])))
    test = canvases.make(*others, index, torch.Generator().manual_seed(args.seed))
    classes = int(torch.cat([labels, others[1]]).max()) + 1
    net = CifarResNet(args.depth) if args.checkpoint is None else load_net(args.checkpoint, args.depth)
    model = make_model(net, classes)
    print(f"{len(images):,} objects to train with, {len(index)} canvases to test on")
    found = []
    for record in train(
        model,
        images,
        labels,
        test,
        seconds=60 * args.budget,
        batch=args.batch,
        seed=args.seed,
        dtype=DTYPES[args.dtype],
    ):
        print(_line(record), flush=True)
        found.append(record)
    _write(found, outputs[0])
    plot.write(found, test, predict(model, test), outputs[1])
    print(f"wrote {outputs[0]} and {outputs[1]}")


def read(path: Path) -> tuple[Tensor, Tensor]:
    """images [N, h, w, 3], uint8, and labels [N], int64.

    Raises:
        OSError, ValueError: the file can't be read or has no such arrays.
    """
    with np.load(path) as arrays:
        missing = [name for name in ("images", "labels") if name not in arrays]
        if missing:
            raise ValueError(f"{path} must have arrays images and labels, got {', '.join(arrays) or 'none'}")
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or len(images) != len(labels):
        raise ValueError(
            f"{path} must have images [N, h, w, 3], uint8, and labels [N], "
            f"got {list(images.shape)}, {images.dtype}, and {list(labels.shape)}"
        )
    if len(images) < 2:
        raise ValueError(f"{path} must have 2 images or more, got {len(images)}")
    return images, labels


def _line(record: Record) -> str:
    return (
        f"step {record.step:>5}  {record.seconds / 60:5.1f} min  "
        f"loss {record.loss_class:.3f} (class) {record.loss_box:.3f} (box)  "
        f"class error {record.class_error:6.1%}  box error {record.box_error:6.1%}  "
        f"localization error {record.localization_error:6.1%}  IoU {record.mean_iou:.2f}"
    )


def _write(records: list[Record], path: Path) -> None:
    with files.atomic(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        table.writeheader()
        for record in records:
            table.writerow({key: round(value, 5) for key, value in asdict(record).items()})
