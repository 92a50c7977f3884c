"""``fusedres experiment localization``: boxes by a regressor for each class (He et al. 2015, appendix C)."""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fusedres.cli import checkpoints, machine, options
from fusedres.cli.bench import report
from fusedres.cli.errors import USAGE, CommandError, out_of_memory, require, writing
from fusedres.cli.experiment import canvases, localizing
from fusedres.cli.experiment.localizing import Record
from fusedres.cli.options import DTYPES, Commands, add_command, at_least, positive_float
from fusedres.models import build
from fusedres.models.resnet import Network
from fusedres.training import files
from fusedres.training.data import DataError
from fusedres.training.data.source import read_archives

MODEL = "resnet20"
TESTED = 400  # canvases


class Localization:
    """The experiment."""

    name = "localization"

    def add_parser(self, commands: Commands) -> argparse.ArgumentParser:
        parser = add_command(
            commands,
            self.name,
            help="boxes by a regressor for each class",
            description="Paste small images at known places of larger canvases, train the paper's region\n"
            "head (appendix C: at each anchor K logistic outputs and 4K box regressions) on a net for\n"
            "CIFAR-10 to find them, and test it on canvases of test images, as it goes: how often the best\n"
            "guess is of another class, and how often the box of the right class overlaps by less than 0.5.\n"
            "Writes localization.csv, localization.png and result.json.\n\n"
            "The paper's, on ImageNet: of the boxes of the true class 33.1% overlap by less than 0.5 with\n"
            "VGG-16 and 13.3% with ResNet-101 (table 13).",
            example="fusedres experiment localization --data cifar10/ \\\n"
            "    --checkpoint runs/20/model.safetensors --budget 10 --out localization",
        )
        parser.add_argument(
            "--data",
            type=Path,
            required=True,
            metavar="DIR",
            help="with one *train*.npz and one *test*.npz: images, uint8 [N, H, W, 3], and labels [N]",
        )
        parser.add_argument(
            "--model",
            choices=tuple(build.CIFAR),
            metavar="NET",
            help=f"a net for CIFAR (default: the checkpoint's, or {MODEL})",
        )
        parser.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FILE",
            help="a net trained to classify, to start from (default: weights at random)",
        )
        parser.add_argument(
            "--zeros",
            choices=("split", "end"),
            help="where its shortcuts have their zero channels (default: as the checkpoint says, or split)",
        )
        parser.add_argument(
            "--budget", type=positive_float, default=10.0, metavar="MINUTES", help="of time (default: 10)"
        )
        parser.add_argument(
            "--batch", type=at_least(1), default=32, metavar="N", help="canvases in a step (default: 32)"
        )
        parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
        parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: 0")
        options.add_threads(parser)
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="takes everything")
        return parser

    def run(self, args: argparse.Namespace) -> int:
        require("matplotlib", f"experiment {self.name}")
        options.check_folder(args.out)
        with options.threads(args.threads), out_of_memory("a smaller --batch"):
            try:
                train, test, classes = read_archives(args.data)
            except DataError as error:
                raise CommandError(str(error)) from error
            torch.manual_seed(args.seed)
            model = localizing.make_model(_net(args, len(classes)), len(classes))
            index = torch.arange(min(TESTED, len(test)))
            generator = torch.Generator().manual_seed(args.seed)
            tested = canvases.make(test.images, test.labels, index, generator)
            print(f"{len(train):,} objects to train with, {len(index)} canvases to test on", flush=True)
            records = []
            try:
                for record in localizing.train(
                    model,
                    train.images,
                    train.labels,
                    tested,
                    seconds=60 * args.budget,
                    batch=args.batch,
                    seed=args.seed,
                    dtype=DTYPES[args.precision],
                ):
                    print(_line(record), flush=True)
                    records.append(record)
            except FloatingPointError as error:
                raise CommandError(f"{error}: try another --seed") from error
            _write(args, records)
            plot = importlib.import_module("fusedres.cli.experiment.localization_plot")
            picture = args.out / "localization.png"
            with writing(picture):
                plot.write(records, tested, localizing.predict(model, tested), picture)
        print(f"wrote {args.out}/localization.csv, {picture} and {args.out}/result.json")
        return 0


EXPERIMENT = Localization()


def _net(args: argparse.Namespace, classes: int) -> Network:
    if args.checkpoint is None:
        return build.build(args.model or MODEL, classes, zeros=args.zeros or "end")
    trained = checkpoints.load(args.model, args.checkpoint, None, args.zeros, default=MODEL)
    if trained.name not in build.CIFAR:
        raise CommandError(f"{args.checkpoint} must be of a net for CIFAR, got {trained.name}", USAGE)
    return trained.net.train()


def _line(record: Record) -> str:
    return (
        f"step {record.step:>5}  {record.seconds / 60:5.1f} min  "
        f"loss {record.loss_class:.3f} (class) {record.loss_box:.3f} (box)  "
        f"class error {record.class_error:6.1%}  box error {record.box_error:6.1%}  "
        f"localization error {record.localization_error:6.1%}  IoU {record.mean_iou:.2f}"
    )


def _write(args: argparse.Namespace, records: Sequence[Record]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    table, result = args.out / "localization.csv", args.out / "result.json"
    with writing(table), files.atomic(table) as temporary, temporary.open("w", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        rows.writeheader()
        for record in records:
            rows.writerow({key: round(value, 5) for key, value in asdict(record).items()})
    found = {
        "command": args.command_line,
        "versions": machine.versions(),
        "machine": machine.facts(torch.device("cpu")),
        "result": asdict(records[-1]),
    }
    with writing(result):
        report.write_json(found, result)
