"""``fusedres predict``: the most likely classes of images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedres
from fusedres.cli import options
from fusedres.cli.errors import FAILED, USAGE, CommandError, first_line, require
from fusedres.cli.options import MODELS, Commands, add_command, at_least

RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_CLASSES = 1000
_PREFIX = "module."  # of DataParallel and DistributedDataParallel


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "predict",
        help="the most likely classes of images",
        description="Print the most likely classes of images. They are resized to\n"
        f"{RESIZE} px on the shorter side, cropped to {CROP} px in the centre and normalised as\n"
        "ImageNet's. An image that can't be read is reported, the others are predicted, and the\n"
        "status is 1.",
        example="fusedres predict cat.jpg dog.jpg --model resnet50 --weights DEFAULT --top 3",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="an image file that pillow reads"
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
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
    model = _pretrained(args) if args.checkpoint is None else _from_checkpoint(args.model, args.checkpoint)
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


def _pretrained(args: argparse.Namespace) -> Any:
    require("torchvision", "--weights")
    try:
        return getattr(fusedres, args.model)(weights=args.weights)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    except (OSError, RuntimeError) as error:  # no network, or a download that is damaged
        raise CommandError(f"can't get the weights {args.weights}: {first_line(error)}") from error


def _from_checkpoint(model: str, path: Path) -> Any:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"there is no checkpoint {path}", USAGE) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CommandError(f"{path} is no checkpoint that torch.load reads: {first_line(error)}") from error
    weights = _state_dict(content, path)
    try:
        net = getattr(fusedres, model)(num_classes=weights["fc.weight"].shape[0])
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
        content = {str(name).removeprefix(_PREFIX): value for name, value in content.items()}
    head = content.get("fc.weight") if isinstance(content, dict) else None
    if not isinstance(head, Tensor) or head.dim() != 2:
        raise CommandError(f"{path} has no state_dict of a ResNet: no matrix fc.weight in it")
    return content  # type: ignore[no-any-return]


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


def preprocess(path: Path) -> Tensor:
    """An image file as a normalised batch of one: [1, 3, 224, 224], fp32."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError as error:
        raise CommandError(f"there is no image {path}") from error
    except Exception as error:  # what a damaged image raises depends on its format
        raise CommandError(f"{path} is no image that can be read: {first_line(error)}") from error
    short = min(image.size)
    width, height = (RESIZE * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    image = image.crop((left, top, left + CROP, top + CROP))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


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
