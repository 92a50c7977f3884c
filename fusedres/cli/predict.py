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
from fusedres.cli import checkpoints, labels, options
from fusedres.cli.errors import FAILED, CommandError, require
from fusedres.cli.images import preprocess
from fusedres.cli.options import Commands, add_command, at_least
from fusedres.cli.views import CIFAR, IMAGENET


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "predict",
        help="the most likely classes of images",
        description="Print the most likely classes of images. They are resized to\n"
        f"{IMAGENET.shorter} px on the shorter side and cropped to {IMAGENET.size} px in the centre, for\n"
        f"CIFAR's nets resized to {CIFAR.size}x{CIFAR.size} px, and normalised as ImageNet's, unless the\n"
        "checkpoint says otherwise. An image that can't be read is reported, the others are\n"
        "predicted, and the status is 1.",
        example="fusedres predict cat.jpg dog.jpg --model resnet50 --weights DEFAULT --top 3",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="an image file that pillow reads"
    )
    checkpoints.add_source(parser)
    labels.add_labels(parser, "ImageNet's for 1000 classes")
    parser.add_argument(
        "--top", type=at_least(1), default=5, metavar="N", help="classes to print (default: 5)"
    )
    options.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    require("PIL.Image", "predict", "pillow")
    options.check_backend(device)
    trained = checkpoints.load(args.model, args.checkpoint, args.weights, args.zeros)
    names = labels.names(args.labels, trained.classes)
    model = fusedres.optimize_for_inference(trained.net.to(device))
    results: list[dict[str, Any]] = []
    for path in args.images:
        try:
            image = preprocess(path, trained.format, trained.normalisation)
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
