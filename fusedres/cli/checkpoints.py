"""Trained nets: weights from a file or from torchvision, in the net that the command line names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedres
from fusedres.cli.errors import USAGE, CommandError, first_line, require
from fusedres.models import build
from fusedres.nn import Zeros

_PREFIX = "module."  # of DataParallel and DistributedDataParallel
_CLASSIFIER = "linear."  # what CIFAR ResNets elsewhere call fc


def add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help='a state_dict saved by torch.save, or one under the key "state_dict" or "model"',
    )
    source.add_argument(
        "--weights", metavar="NAME", help="torchvision's pretrained weights, as DEFAULT or IMAGENET1K_V1"
    )


def load(model: str, checkpoint: Path | None, weights: str | None, zeros: Zeros = "split") -> Any:
    """The net with the weights that ``add_source``'s options name, on the CPU.

    Args:
        model: one of ``build.NAMES``.
        checkpoint: the file; None for ``weights``.
        weights: torchvision's name of them.
        zeros: where a CIFAR net's shortcuts have their zero channels.

    Raises:
        CommandError: there are no such weights, or they are another net's.
    """
    return _pretrained(model, weights) if checkpoint is None else _from_checkpoint(model, checkpoint, zeros)


def _pretrained(model: str, weights: str | None) -> Any:
    if model not in build.RESNETS:
        raise CommandError(f"torchvision has no weights of {model}: give a --checkpoint", USAGE)
    require("torchvision", "--weights")
    try:
        return getattr(fusedres, model)(weights=weights)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    except (OSError, RuntimeError) as error:  # no network, or a download that is damaged
        raise CommandError(f"can't get the weights {weights}: {first_line(error)}") from error


def _from_checkpoint(model: str, path: Path, zeros: Zeros) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"there is no checkpoint {path}", USAGE) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CommandError(f"{path} is no checkpoint that torch.load reads: {first_line(error)}") from error
    weights = _state_dict(content, path)
    try:
        net = build.build(model, weights["fc.weight"].shape[0], zeros=zeros)
        net.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} has no weights for {model}: {reason[:300]}") from error
    return net


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict):
        content = {_own_name(str(name)): value for name, value in content.items()}
    head = content.get("fc.weight") if isinstance(content, dict) else None
    if not isinstance(head, Tensor) or head.dim() != 2:
        raise CommandError(f"{path} has no state_dict of a ResNet: no matrix fc.weight in it")
    return content  # type: ignore[no-any-return]


def _own_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return f"fc.{name.removeprefix(_CLASSIFIER)}" if name.startswith(_CLASSIFIER) else name
