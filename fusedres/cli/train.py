"""``fusedres train``: a net by a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import torch

from fusedres.cli import machine, options, recipes
from fusedres.cli.bench import report
from fusedres.cli.errors import USAGE, CommandError, out_of_memory, require, writing
from fusedres.cli.options import DTYPES, Commands, add_command, at_least, positive_float
from fusedres.models import build
from fusedres.training import checkpoint, distributed, recipe, runner
from fusedres.training.data import Data, DataError, open_data
from fusedres.training.data.source import DIGITS
from fusedres.training.distributed import Processes
from fusedres.training.log import Epoch
from fusedres.training.recipe import Recipe, RecipeError
from fusedres.training.run import Run

READERS = 4
# what changes a run's outcome: to go on with one, they are what they were
_RUN = ("seed", "shortcut", "variant", "precision", "accumulate", "recompute", "sync_bn", "loader")
_RECIPE = ("data", "recipe", "set", "model", "epochs", "iterations", "batch", "lr")


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    found = "\n".join(f"  {name:<16}{recipe.load(name).description}" for name in recipe.names())
    parser = add_command(
        commands,
        "train",
        help="train a net by one of the paper's recipes, or your own",
        description="Train a network by a recipe, test it after every epoch, and save as it goes.\n\n"
        f"recipes:\n{found}\n\n"
        "A recipe of your own is a .yaml with the keys of these. --out DIR takes last.pt, all that\n"
        "the run goes on from; log.csv; recipe.yaml; and at the end model.safetensors, the weights\n"
        "alone. Ctrl-C and SIGTERM stop after the step under way and save; --resume DIR goes on, on one\n"
        "device bit for bit as if nothing had happened.\n\n"
        "several GPUs or machines:\n  torchrun --nproc-per-node 8 -m fusedres train ...",
        example="fusedres train --data digits --out runs/digits\n"
        "  fusedres train --recipe cifar-paper --data cifar10/ --model resnet56 --out runs/56\n"
        "  fusedres train --recipe imagenet-paper --data imagenet/ --precision bf16 --out runs/50\n"
        "  fusedres train --resume runs/56",
    )
    what = parser.add_argument_group("the run")
    what.add_argument(
        "--data",
        metavar="DATA",
        help="digits (scikit-learn's, 1,797 real images), or a folder: with a *train*.npz and a *test*.npz, "
        "with torchvision's CIFAR-10 or CIFAR-100, or with train/ and val/ that have a subfolder of images "
        "for each class (default: digits)",
    )
    what.add_argument(
        "--recipe",
        metavar="NAME",
        help="one of the above or a .yaml (default with digits: digits)",
    )
    recipes.add_set(what)
    what.add_argument(
        "--model",
        choices=build.NAMES,
        metavar="MODEL",
        help=f"{', '.join(build.NAMES)} (default: the recipe's)",
    )
    what.add_argument(
        "--shortcut",
        choices=("A", "B", "C"),
        help="He et al. 2015, section 4.1 (default: B, for CIFAR's nets A)",
    )
    what.add_argument(
        "--variant",
        choices=("v1.5", "v1"),
        help="bottlenecks with the stride on the 3x3, or, as in the paper, on the first 1x1 (default: v1.5)",
    )
    length = what.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=at_least(1), metavar="N", help="another length; the schedule shrinks with it"
    )
    length.add_argument("--iterations", type=at_least(1), metavar="N", help="likewise, in steps")
    what.add_argument(
        "--batch",
        type=at_least(1),
        metavar="N",
        help="images in a step, over all processes (default: the recipe's)",
    )
    what.add_argument(
        "--lr", type=positive_float, metavar="RATE", help="learning rate (default: the recipe's)"
    )
    what.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="of weights, splits, order and augmentation (default: 0)",
    )
    what.add_argument(
        "--precision",
        choices=tuple(DTYPES),
        help="bf16 and fp16 train under autocast, fp16 with a scaled loss (default: fp32)",
    )
    what.add_argument(
        "--accumulate",
        type=at_least(1),
        metavar="N",
        help="take a batch in N parts, for less memory (default: 1)",
    )
    what.add_argument(
        "--recompute",
        action="store_const",
        const=True,
        help="keep the blocks' inputs alone and compute the rest again in the backward, for less memory",
    )
    what.add_argument(
        "--sync-bn", action="store_const", const=True, help="batch norm statistics over all processes"
    )
    what.add_argument(
        "--loader",
        choices=("torchvision", "dali"),
        help="what reads folders of images; dali is NVIDIA's, which decodes and resizes on the GPU "
        "(default: torchvision)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the run's files there")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    parser.add_argument(
        "--save-every",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="iterations between two checkpoints, besides those after every epoch (default: 1000)",
    )
    parser.add_argument(
        "--readers",
        type=at_least(0),
        default=READERS,
        metavar="N",
        help=f"processes that read image files, with dali threads (default: {READERS})",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write DIR/tensorboard")
    options.add_device(parser)
    options.add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what every epoch came to")
    return parser


def run(args: argparse.Namespace) -> int:
    processes = distributed.environment()
    device = _device(args, processes)
    if args.sync_bn and device.type != "cuda":
        raise CommandError("--sync-bn needs GPUs: PyTorch's SyncBatchNorm has no kernel for CPUs", USAGE)
    state = _state(args)
    out = args.resume or args.out
    _check_outputs(args, out)
    remedy = "a smaller --batch, --accumulate or --recompute"
    with options.threads(args.threads), out_of_memory(remedy), distributed.joined(processes, device):
        try:
            planned, data = _plan(args, state, device)
            settings = runner.Settings(device, out, args.save_every, args.tensorboard)
            if processes.is_first:
                print(_headline(planned, data, processes), flush=True)
            history = _train(planned, data, settings, processes, state)
        except (RecipeError, DataError) as error:
            raise CommandError(str(error)) from error
        except runner.Interrupted:
            raise KeyboardInterrupt(f", --resume {out} goes on" if out else "") from None
    if processes.is_first:
        _report(args, out, device, planned, history)
    return 0


def _device(args: argparse.Namespace, processes: Processes) -> torch.device:
    device = options.device(args.device)
    return torch.device("cuda", processes.local_rank) if device.type == "cuda" else device


def _state(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the run to go on with is at."""
    if args.resume is None:
        if args.out is not None and runner.resumable(args.out):
            raise CommandError(f"{args.out} has a run already: --resume {args.out} goes on with it", USAGE)
        return None
    given = [name for name in (*_RECIPE, *_RUN, "out") if getattr(args, name) is not None]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise CommandError(f"{option} can't be given with --resume: the run stays what it is", USAGE)
    try:
        return checkpoint.load(args.resume / checkpoint.LAST)
    except checkpoint.CheckpointError as error:
        raise CommandError(str(error)) from error


def _check_outputs(args: argparse.Namespace, out: Path | None) -> None:
    if args.tensorboard:
        if out is None:
            raise CommandError("--tensorboard needs --out", USAGE)
        require("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    options.check_outputs(args.json)
    if out is not None:
        options.check_folder(out)


def _plan(args: argparse.Namespace, state: dict[str, Any] | None, device: torch.device) -> tuple[Run, Data]:
    if state is not None:
        run = Run.from_state_dict(state["run"])
        return run, open_data(run.data, run.recipe, run.seed, device, args.readers, run.loader)
    source = args.data or DIGITS
    chosen = _recipe(args, source)
    run = Run(
        chosen,
        source,
        **{name: value for name in _RUN if (value := getattr(args, name)) is not None},
    )
    data = open_data(source, chosen, run.seed, device, args.readers, run.loader)
    if args.epochs or args.iterations:
        shortened = chosen.shortened(
            iterations=args.iterations, epochs=args.epochs, steps=max(1, len(data.train) // chosen.batch)
        )
        run = dataclasses.replace(run, recipe=shortened)
    return run, data


def _recipe(args: argparse.Namespace, source: str) -> Recipe:
    name = args.recipe or (DIGITS if source == DIGITS else None)
    if name is None:
        raise CommandError(f"--recipe is needed with --data {source}: {', '.join(recipe.names())}", USAGE)
    named = {"model": args.model, "batch": args.batch, "optimizer.lr": args.lr}
    return recipes.load(name, args.set, named)


def _headline(run: Run, data: Data, processes: Processes) -> str:
    count = f"{len(data.train):,} training"
    if data.validation is not None:
        count += f", {len(data.validation):,} held-out"
    shortcut = f" with shortcut {run.shortcut}" if run.shortcut else ""
    several = f", {processes.count} processes" if processes.count > 1 else ""
    return (
        f"{run.recipe.model}{shortcut}, {run.precision}, {count} and {len(data.test):,} test images of "
        f"{len(data.classes):,} classes{several}"
    )


def _train(
    run: Run, data: Data, settings: runner.Settings, processes: Processes, state: dict[str, Any] | None
) -> list[Epoch]:
    history = [] if state is None else [Epoch(**epoch) for epoch in state["history"]]
    try:
        for epoch in runner.train(run, data, settings, processes, state):
            history.append(epoch)
            if processes.is_first:
                print(f"{epoch}{_left(epoch, run, data)}", flush=True)
    except FloatingPointError as error:
        raise CommandError(f"{error}: try a smaller --lr{_last(settings.out)}") from error
    except DataError as error:
        raise CommandError(f"{error}{_last(settings.out)}") from error
    except ValueError as error:  # the recipe and the images don't fit
        raise CommandError(str(error), USAGE) from error
    except OSError as error:
        raise CommandError(f"can't write to {settings.out}: {error}{_last(settings.out)}") from error
    return history


def _left(epoch: Epoch, run: Run, data: Data) -> str:
    """How long the rest takes at the speed so far."""
    length = run.recipe.length(len(data.train) // run.recipe.batch)
    seconds = round(epoch.seconds / epoch.iteration * (length - epoch.iteration))
    return f"  {datetime.timedelta(seconds=seconds)} left" if seconds else ""


def _last(out: Path | None) -> str:
    """What is there to go on from, to be said behind an error."""
    return f"; --resume {out} goes on from its last checkpoint" if out and runner.resumable(out) else ""


def _report(
    args: argparse.Namespace, out: Path | None, device: torch.device, run: Run, history: list[Epoch]
) -> None:
    final = history[-1]
    print(f"final test accuracy {1 - final.test_error:.2%} ({final.correct:,} of {final.tested:,})")
    if out is not None:
        print(
            f"wrote {', '.join(str(out / name) for name in (checkpoint.WEIGHTS, checkpoint.LAST, 'log.csv'))}"
        )
    if args.json is not None:
        found = {
            "command": args.command_line,
            "versions": machine.versions(),
            "machine": machine.facts(device),
            "run": run.state_dict(),
            "history": [dataclasses.asdict(epoch) for epoch in history],
        }
        with writing(args.json):
            report.write_json(found, args.json)
