"""Option types and checks that several commands share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch

from fusedres import ops
from fusedres.cli.errors import USAGE, CommandError
from fusedres.training import files

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number no smaller than ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return value

    return parse


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def add_command(
    commands: Commands, name: str, help: str, description: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to run (default: cuda where there is a GPU, else cpu)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=at_least(1), metavar="N", help="CPU threads (default: what torch picks)"
    )


def device(asked: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if asked == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise CommandError(f"--device cuda: {why}", USAGE)
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_backend(device: torch.device) -> None:
    """Refuse a forced backend that can't serve on ``device``."""
    try:
        ops.choice("bn_act", device, torch.float32, ops.forced_backend())
    except RuntimeError as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` CPU threads; None leaves the number alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_outputs(*paths: Path | None) -> None:
    """Refuse, before any work, files that can't be written."""
    for path in paths:
        if path is not None:
            try:
                files.check_writable(path)
            except OSError as error:
                raise CommandError(str(error), USAGE) from error


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that can't be made or written to."""
    there = folder
    while not there.exists():
        there = there.absolute().parent
    if not there.is_dir():
        raise CommandError(f"can't write to {folder}: {there} is no directory", USAGE)
    check_outputs(there / "file")
