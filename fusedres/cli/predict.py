"""``fusedres predict``: the most likely classes of images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres.cli import checkpoints, options
from fusedres.cli.errors import FAILED, USAGE, CommandError, first_line, require
from fusedres.cli.images import IMAGENET, preprocess
from fusedres.cli.options import MODELS, Commands, add_command, at_least

_IMAGENET_CLASSES = 1000


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "predict",
        help="the most likely classes of images",
        description="Print the most likely classes of images. They are resized to\n"
        f"{IMAGENET.shorter} px on the shorter side, cropped to {IMAGENET.size} px in the centre and\n"
        "normalised as ImageNet's. An image that can't be read is reported, the others are\n"
        "predicted, and the status is 1.",
        example="fusedres predict cat.jpg dog.jpg --model resnet50 --weights DEFAULT --top 3",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="an image file that pillow reads"
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
    checkpoints.add_source(parser)
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names, one a line (default: ImageNet's for 1000 classes)",
    )
    parser.add_argument(
        "--top", type=at_least(1), default=5, metavar="N", help="classes to print (default: 5)"
    )
    options.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    require("PIL.Image", "predict", "pillow")
    model = checkpoints.load(args.model, args.checkpoint, args.weights)
    names = _labels(args.labels, model.fc.out_features)
    model = fusedres.optimize_for_inference(model.to(device).eval())
    results: list[dict[str, Any]] = []
    for path in args.images:
        try:
            image = preprocess(path)
        except CommandError as error:
            print(f"fusedres: error: {error}", file=sys.stderr)
            results.append({"image": str(path), "error": str(error)})
            continue
        results.append({"image": str(path), "predictions": predict(model, image.to(device), args.top, names)})
        if not args.json:
            print(render(results[-1]))
    if args.json:
        print(json.dumps(results, indent=2))
    return FAILED if any("error" in result for result in results) else 0


def _labels(path: Path | None, classes: int) -> list[str] | None:
    """A name for every class; None where there are none."""
    if path is not None:
        try:
            names = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"can't read --labels {path}: {first_line(error)}", USAGE) from error
        if len(names) != classes:
            raise CommandError(
                f"--labels {path} must have {classes} lines, one a class, got {len(names)}", USAGE
            )
        return names
    if classes != _IMAGENET_CLASSES:
        return None
    try:
        from torchvision.models import ResNet50_Weights  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        print("fusedres: note: class names need torchvision, or --labels", file=sys.stderr)
        return None
    return list(ResNet50_Weights.DEFAULT.meta["categories"])


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor, top: int, names: list[str] | None) -> list[dict[str, Any]]:
    """The ``top`` most likely classes, best first."""
    probabilities = model(image)[0].softmax(0)
    best = probabilities.topk(min(top, len(probabilities)))
    return [
        {"class": index, "label": names[index] if names else None, "probability": probability}
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def render(result: dict[str, Any]) -> str:
    lines = [result["image"]]
    for entry in result["predictions"]:
        name = entry["label"] or f"class {entry['class']}"
        lines.append(f"  {entry['probability']:7.2%}  {name}")
    return "\n".join(lines)
