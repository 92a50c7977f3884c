"""``fusedres train``: a CIFAR ResNet on real images that need no download."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fusedres import CifarResNet
from fusedres.cli import options
from fusedres.cli.errors import CommandError, require
from fusedres.cli.options import Commands, add_command, at_least, positive_float
from fusedres.training import data, loop

DEPTH = 20
DATA = ("digits",)


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "train",
        help="train a ResNet-20 on handwritten digits",
        description=f"Train a ResNet-{DEPTH} of He et al. 2015, section 4.2, on scikit-learn's\n"
        "handwritten digits: 1,797 real images, four fifths for training and the rest for testing.\n"
        f"SGD with momentum {loop.MOMENTUM} and weight decay {loop.WEIGHT_DECAY:g}, cosine schedule, "
        "fp32, on the CPU.",
        example="fusedres train --data digits --epochs 10 --out runs",
    )
    parser.add_argument("--data", choices=DATA, default="digits", help="default: digits")
    parser.add_argument("--epochs", type=at_least(1), default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--batch", type=at_least(2), default=64, metavar="N", help="images in a step (default: 64)"
    )
    parser.add_argument(
        "--lr",
        type=positive_float,
        default=0.05,
        metavar="RATE",
        help="learning rate at the start (default: 0.05)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of split, weights and order (default: 0)"
    )
    options.add_threads(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write a checkpoint there; DIR is made if it doesn't exist"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    require("sklearn.datasets", "--data digits", "scikit-learn")
    checkpoint = None
    if args.out is not None:
        checkpoint = args.out / f"{args.data}-resnet{DEPTH}.pt"
        # the folder comes into being with the checkpoint, not before
        options.check_outputs(checkpoint if args.out.exists() else args.out)
    with options.threads(args.threads):
        torch.manual_seed(args.seed)
        split = data.digits(args.seed)
        model = CifarResNet(DEPTH).to(memory_format=torch.channels_last)
        print(
            f"ResNet-{DEPTH}, {len(split.train_labels):,} training and {len(split.test_labels)} test images"
        )
        try:
            for epoch in loop.fit(
                model, split, epochs=args.epochs, batch=args.batch, lr=args.lr, seed=args.seed
            ):
                print(_line(epoch), flush=True)
        except FloatingPointError as error:
            raise CommandError(f"{error}: try a smaller --lr") from error
    print(f"final test accuracy {epoch.accuracy:.2%} ({epoch.correct} of {epoch.tested})")
    if checkpoint is not None:
        _save(checkpoint, model, epoch)
    return 0


def _line(epoch: loop.Epoch) -> str:
    return (
        f"epoch {epoch.number:>3}  loss {epoch.loss:.4f}  test accuracy {epoch.accuracy:7.2%}  "
        f"{epoch.images_per_second:,.0f} img/s"
    )


def _save(path: Path, model: CifarResNet, epoch: loop.Epoch) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        loop.save(path, model, depth=DEPTH, epoch=epoch.number, test_accuracy=epoch.accuracy)
    except OSError as error:
        raise CommandError(f"can't write {path}: {error}") from error
    print(f"wrote {path}")
