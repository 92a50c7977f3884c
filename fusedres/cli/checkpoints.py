"""Trained nets: weights from a file or from torchvision, and what the file says about them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import fusedres
from fusedres.cli.errors import USAGE, CommandError, first_line, require
from fusedres.cli.options import MODELS
from fusedres.cli.views import CIFAR, IMAGENET, Format
from fusedres.models import build
from fusedres.models.resnet import Network
from fusedres.nn import Zeros
from fusedres.training.checkpoint import METADATA, NORMALISATION
from fusedres.training.normalise import IMAGENET as IMAGENET_PIXELS
from fusedres.training.normalise import Normalisation

DEFAULT = "resnet50"
_PREFIX = "module."  # of DataParallel and DistributedDataParallel
_AVERAGED = "n_averaged"  # how many weights an average is of
_CLASSIFIER = "linear."  # what CIFAR ResNets elsewhere call fc
_CHANNELS = 3


@dataclass(frozen=True)
class Trained:
    """A net with its weights, on the CPU in eval mode, and what it reads.

    Args:
        net: [N, 3, H, W] -> [N, classes].
        name: of ``build.NAMES``.
        source: the file, or torchvision's name of the weights.
        normalisation: of its images.
        format: likewise.
        zeros: where its shortcuts have zero channels; None for ImageNet's nets.
    """

    net: Network
    name: str
    source: str
    normalisation: Normalisation = IMAGENET_PIXELS
    format: Format = IMAGENET
    zeros: Zeros | None = None

    @property
    def classes(self) -> int:
        return self.net.fc.out_features  # type: ignore[union-attr,return-value]


def add_source(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Options for a net and its weights; ``several`` times each, or once."""
    action = "append" if several else "store"
    parser.add_argument(
        "--model",
        action=action,
        choices=build.NAMES,
        metavar="MODEL",
        help=f"{', '.join((*MODELS, *build.PLAIN))} or a net for CIFAR: {', '.join(build.CIFAR)} "
        f"(default: the one that the checkpoint names, or {DEFAULT})",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        action=action,
        type=Path,
        metavar="FILE",
        help='a state_dict saved by torch.save, or one under the key "state_dict" or "model", or a '
        ".safetensors" + "; several make an ensemble" * several,
    )
    source.add_argument(
        "--weights",
        action=action,
        metavar="NAME",
        help="torchvision's pretrained weights, as DEFAULT or IMAGENET1K_V1",
    )
    parser.add_argument(
        "--zeros",
        choices=("split", "end"),
        help="where a CIFAR net's shortcuts have their zero channels: on both sides, as in published "
        "weights, or at the end, as in fusedres.CifarResNet unless told otherwise (default: as the "
        "checkpoint says, or split)",
    )


def load(
    model: str | None,
    checkpoint: Path | None,
    weights: str | None,
    zeros: Zeros | None = None,
    default: str = DEFAULT,
) -> Trained:
    """The net with the weights that ``add_source``'s options name.

    Args:
        model: one of ``build.NAMES``; None for the one that the checkpoint names, or ``default``.
        checkpoint: the file; None for ``weights``.
        weights: torchvision's name of them.
        zeros: where a CIFAR net's shortcuts have their zero channels; None for what the checkpoint says.

    Raises:
        CommandError: there are no such weights, they are another net's, or not finite.
    """
    if checkpoint is not None:
        return _from_checkpoint(model, checkpoint, zeros, default)
    model = model or default
    _check_zeros(model, zeros)
    return Trained(_pretrained(model, weights).eval(), model, str(weights))


def load_several(args: argparse.Namespace) -> list[Trained]:
    """The nets that ``add_source``'s options name, each given several times or once.

    Raises:
        CommandError: there are not as many models as sources, nor one; or see :func:`load`.
    """
    from_files = args.checkpoint is not None
    sources, models = args.checkpoint or args.weights, args.model or [None]
    if len(models) not in (1, len(sources)):
        option = "--checkpoint" if from_files else "--weights"
        raise CommandError(
            f"--model must be given once, or once for each {option}, got {len(models)} for {len(sources)}",
            USAGE,
        )
    models = models * len(sources) if len(models) == 1 else models
    return [
        load(model, source if from_files else None, None if from_files else source, args.zeros)
        for model, source in zip(models, sources, strict=True)
    ]


def _pretrained(model: str, weights: str | None) -> Network:
    if model not in build.RESNETS:
        raise CommandError(f"torchvision has no weights of {model}: give a --checkpoint", USAGE)
    require("torchvision", "--weights")
    try:
        return getattr(fusedres, model)(weights=weights)  # type: ignore[no-any-return]
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    except (OSError, RuntimeError) as error:  # no network, or a download that is damaged
        raise CommandError(f"can't get the weights {weights}: {first_line(error)}") from error


def _check_zeros(model: str, zeros: Zeros | None) -> None:
    if zeros and model not in build.CIFAR:
        raise CommandError(f"--zeros is for CIFAR's nets, {model} has no zero channels", USAGE)


def _from_checkpoint(model: str | None, path: Path, zeros: Zeros | None, default: str) -> Trained:
    content = _read(path)
    weights = _state_dict(content, path)
    facts = content.get("net")
    facts = facts if isinstance(facts, Mapping) and "name" in facts else {}  # or it is none of ours
    name = facts.get("name", model or default)
    if name not in build.NAMES:
        raise CommandError(f"{path} is of a net that fusedres doesn't have, {name!r}")
    _check_zeros(name, zeros)
    for option, asked, own in (("--model", model, name), ("--zeros", zeros, facts.get("zeros", zeros))):
        if asked not in (None, own):
            raise CommandError(f"{option} {asked} is not what {path} has, {own}: leave it out", USAGE)
    classes = weights["fc.weight"].shape[0]
    if facts.get("num_classes", classes) != classes:
        raise CommandError(f"{path} is of a net of {facts['num_classes']} classes, its weights of {classes}")
    zeros = zeros or facts.get("zeros") or ("end" if facts else "split")
    try:
        net = build.build(
            name,
            classes,
            shortcut=facts.get("shortcut"),
            zeros=zeros,
            variant=facts.get("variant") or "v1.5",
        )
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"{path} has no weights for {name}: {reason[:300]}") from error
    for key, value in net.state_dict().items():
        if not value.isfinite().all():
            raise CommandError(f"{path} has values that are not finite, in {key}")
    cifar = name in build.CIFAR
    return Trained(
        net.eval(),
        name,
        str(path),
        _normalisation(content, path),
        _format(content, CIFAR if cifar else IMAGENET, path),
        zeros if cifar else None,
    )


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint as torch.save's dict, whatever it was written by."""
    safe = path.suffix == ".safetensors"
    try:
        content = _read_safetensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"there is no checkpoint {path}", USAGE) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reader = "safetensors" if safe else "torch.load"
        raise CommandError(f"{path} is no checkpoint that {reader} reads: {first_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        names, metadata = file.keys(), file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in names}
    facts = json.loads(metadata.get(METADATA, "{}"))
    normalisation = {
        name.removeprefix(NORMALISATION): tensors.pop(name)
        for name in [*tensors]
        if name.startswith(NORMALISATION)
    }
    return {"model": tensors, **facts} | ({"normalisation": normalisation} if normalisation else {})


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    weights = content
    for key in ("averaged", "state_dict", "model"):  # a run keeps the average of its weights, if it has one
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    weights = {_own_name(str(name)): value for name, value in weights.items() if name != _AVERAGED}
    head = weights.get("fc.weight")
    if not isinstance(head, Tensor) or head.dim() != 2:
        raise CommandError(f"{path} has no state_dict of a ResNet: no matrix fc.weight in it")
    return weights


def _own_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    return f"fc.{name.removeprefix(_CLASSIFIER)}" if name.startswith(_CLASSIFIER) else name


def _normalisation(content: dict[str, Any], path: Path) -> Normalisation:
    """The checkpoint's own, or ImageNet's."""
    state = content.get("normalisation")
    if state is None:
        return IMAGENET_PIXELS
    try:
        own = Normalisation.from_state_dict(state if isinstance(state, dict) else {})
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    own = Normalisation(own.mean.float(), own.std.float())
    if len(own.mean) != _CHANNELS or not (own.mean.isfinite().all() and (own.std > 0).all()):
        raise CommandError(f"{path}: a normalisation must have {_CHANNELS} channels, finite, std above 0")
    return own


def _format(content: dict[str, Any], default: Format, path: Path) -> Format:
    """What the checkpoint says, or the default of its kind of net."""
    size = content.get("size")
    if size is None:
        return default
    if not _positive(size):
        raise CommandError(f"{path}: size must be a whole number of at least 1, got {size!r}")
    format = default.of_size(size)
    if "resize" in content:
        shorter = content["resize"]
        if shorter is not None and not (_positive(shorter) and shorter >= size):
            raise CommandError(f"{path}: resize must be None or at least size, {size}, got {shorter!r}")
        format = Format(size, shorter)
    return format


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
