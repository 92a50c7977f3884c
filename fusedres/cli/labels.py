"""Names of classes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusedres.cli.errors import USAGE, CommandError, first_line

_IMAGENET_CLASSES = 1000


def add_labels(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help=f"class names, one a line (default: {default})"
    )


def names(path: Path | None, classes: int) -> list[str] | None:
    """A name for every class: of a file, or ImageNet's for 1000; None where there are none."""
    if path is not None:
        return _in_file(path, classes)
    if classes != _IMAGENET_CLASSES:
        return None
    try:
        from torchvision.models import ResNet50_Weights  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        print("fusedres: note: class names need torchvision, or --labels", file=sys.stderr)
        return None
    return list(ResNet50_Weights.DEFAULT.meta["categories"])


def _in_file(path: Path, classes: int) -> list[str]:
    try:
        found = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"can't read --labels {path}: {first_line(error)}", USAGE) from error
    if len(found) != classes:
        raise CommandError(f"--labels {path} must have {classes} lines, one a class, got {len(found)}", USAGE)
    return found
