"""The experiments that train several nets: degradation, shortcuts and depth."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fusedres.cli import machine, options, recipes
from fusedres.cli.bench import report
from fusedres.cli.errors import USAGE, CommandError, out_of_memory, require, writing
from fusedres.cli.experiment import paper, series
from fusedres.cli.experiment.paper import Reported
from fusedres.cli.experiment.series import Curves, Entry, ExperimentError, Series
from fusedres.cli.options import DTYPES, Commands, add_command, at_least, positive_float
from fusedres.models import build
from fusedres.models.resnet import Shortcut
from fusedres.training import runner
from fusedres.training.checkpoint import CheckpointError
from fusedres.training.data import DataError

RECIPE = "cifar-paper"
SHORTCUTS: tuple[Shortcut, ...] = ("A", "B", "C")


@dataclass(frozen=True)
class Comparison:
    """An experiment that trains several nets by one recipe.

    Args:
        name: of the command.
        help: one line.
        description: what is compared, with its source.
        nets: that are trained unless others are asked for.
        note: under what conditions the paper's figures are.
        entries: the nets as they are trained.
        panels: title -> labels of the nets in it.
    """

    name: str
    help: str
    description: str
    nets: tuple[str, ...]
    note: str
    entries: Callable[[list[str]], list[Entry]]
    panels: Callable[[Curves], Mapping[str, Curves]]

    def add_parser(self, commands: Commands) -> argparse.ArgumentParser:
        parser = add_command(
            commands,
            self.name,
            help=self.help,
            description=self.description + "\n\nNets are trained one after the other, each into a folder of "
            "--out; the same command\nagain goes on where it stopped. Writes curves.csv, curves.png and "
            "result.json.",
            example=f"fusedres experiment {self.name} --data cifar10/ --budget 60 --out {self.name}",
        )
        parser.add_argument(
            "--data", required=True, metavar="DATA", help="digits or a folder, as for fusedres train"
        )
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="takes everything")
        parser.add_argument(
            "--nets",
            nargs="+",
            choices=build.NAMES,
            default=list(self.nets),
            metavar="NET",
            help=f"default: {' '.join(self.nets)}",
        )
        parser.add_argument(
            "--recipe", default=RECIPE, metavar="NAME", help=f"name or .yaml (default: {RECIPE})"
        )
        recipes.add_set(parser)
        length = parser.add_mutually_exclusive_group()
        length.add_argument(
            "--budget",
            type=positive_float,
            metavar="MINUTES",
            help="as many epochs as fit, the schedule shrunk with them (default: the recipe's length)",
        )
        length.add_argument("--epochs", type=at_least(1), metavar="N", help="of each net")
        parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: 0")
        parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="default: fp32")
        parser.add_argument(
            "--readers", type=at_least(0), default=4, metavar="N", help="processes that read image files"
        )
        options.add_device(parser)
        options.add_threads(parser)
        return parser

    def run(self, args: argparse.Namespace) -> int:
        require("matplotlib", f"experiment {self.name}")
        device = options.device(args.device)
        options.check_folder(args.out)
        entries = self.entries(args.nets)
        of = Series(
            entries,
            {entry.label: recipes.load(args.recipe, args.set, {"model": entry.model}) for entry in entries},
            args.data,
            args.out,
            args.epochs,
            args.budget and 60 * args.budget,
            args.seed,
            args.precision,
            device,
            args.readers,
        )
        with options.threads(args.threads), out_of_memory("a recipe with a smaller batch"):
            try:
                curves = of.train(lambda line: print(line, flush=True))
            except (DataError, CheckpointError, ExperimentError) as error:
                raise CommandError(str(error)) from error
            except FloatingPointError as error:
                raise CommandError(f"{error}: try a recipe with a smaller optimizer.lr") from error
            except ValueError as error:  # the recipe and the images don't fit
                raise CommandError(str(error), USAGE) from error
            except runner.Interrupted:
                raise KeyboardInterrupt(", the same command goes on") from None
            except OSError as error:
                raise CommandError(f"can't write to {args.out}: {error}; the same command goes on") from error
            reported = paper.CIFAR | paper.IMAGENET_10_CROP
            print("\n" + series.table(curves, reported, self.note))
            self._write(args, curves, reported, machine.facts(device))
        return 0

    def _write(
        self,
        args: argparse.Namespace,
        curves: Curves,
        reported: Mapping[str, Reported],
        facts: Mapping[str, object],
    ) -> None:
        epochs = max(len(history) for history in curves.values())
        picture, result = args.out / "curves.png", args.out / "result.json"
        with writing(picture):
            series.plot(picture, self.panels(curves), f"{self.name}: {args.recipe}, {epochs} epochs")
        found = {
            "command": args.command_line,
            "versions": machine.versions(),
            "machine": facts,
            "settings": {
                "recipe": args.recipe,
                "set": args.set,
                "epochs": epochs,
                "seed": args.seed,
                "precision": args.precision,
            },
            "nets": {label: dataclasses.asdict(history[-1]) for label, history in curves.items()},
            "paper": {label: theirs._asdict() for label, theirs in reported.items() if label in curves},
            "note": self.note,
        }
        with writing(result):
            report.write_json(found, result)
        print(f"wrote {picture}, {args.out / series.CURVES}, {result}")


def _plain_and_residual(nets: list[str]) -> list[Entry]:
    """ImageNet's residual nets with shortcut A, which has as many parameters as the plain net."""
    zeros: Shortcut = "A"
    return [Entry(net, net, zeros if net in ("resnet18", "resnet34") else None) for net in nets]


def _every_shortcut(nets: list[str]) -> list[Entry]:
    return [Entry(f"{net} {shortcut}", net, shortcut) for net in nets for shortcut in SHORTCUTS]


def _by_kind(curves: Curves) -> Mapping[str, Curves]:
    kinds = {"plain": "plain nets", "resnet": "residual nets"}
    panels = {
        title: {label: history for label, history in curves.items() if label.startswith(kind)}
        for kind, title in kinds.items()
    }
    return {title: panel for title, panel in panels.items() if panel}


_CIFAR_NOTE = (
    "The paper's are after 64,000 iterations (section 4.2); of its plain nets on CIFAR-10 it has curves "
    "alone (figures 1 and 6)."
)

EXPERIMENTS = (
    Comparison(
        "degradation",
        "plain against residual nets",
        "Plain nets get worse with depth, in training too; residual nets get better (figures 1, 4 and 6).\n"
        "For figure 4: --data imagenet/ --recipe imagenet-paper --nets plain18 plain34 resnet18 resnet34",
        ("plain20", "plain56", "resnet20", "resnet56"),
        _CIFAR_NOTE,
        _plain_and_residual,
        _by_kind,
    ),
    Comparison(
        "shortcuts",
        "shortcuts A, B and C",
        "Zero padding (A), projections where the shape changes (B), or everywhere (C) (table 3).\n"
        "For the paper's: --data imagenet/ --recipe imagenet-paper --nets resnet34",
        ("resnet20",),
        "The paper's are of ResNet-34 on ImageNet, 10 crops: A 25.03%, B 24.52%, C 24.19% (table 3).",
        _every_shortcut,
        lambda curves: {"shortcuts": curves},
    ),
    Comparison(
        "depth",
        "residual nets of rising depth",
        "Residual nets for CIFAR-10 of 20 to 110 layers (table 6); the paper trains the one of 110 with\n"
        "--recipe cifar110-warmup.",
        ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
        _CIFAR_NOTE,
        _plain_and_residual,
        lambda curves: {"residual nets": curves},
    ),
)
