"""``fusedres eval``: the errors of a trained net, or of an ensemble, as He et al. 2015 report them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusedres
from fusedres.cli import checkpoints, images, labels, machine, options
from fusedres.cli.bench import report
from fusedres.cli.checkpoints import Trained
from fusedres.cli.errors import USAGE, CommandError, out_of_memory, writing
from fusedres.cli.images import SUFFIXES, Images
from fusedres.cli.options import DTYPES, Commands, add_command, at_least
from fusedres.cli.scores import TOP, Member, Tally, score
from fusedres.cli.views import IMAGENET, SCALES, Format, Protocol
from fusedres.inference.graph import When
from fusedres.models import build

Report = dict[str, Any]
BATCH = 64


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "eval",
        help="top-1 and top-5 error of a trained net or of an ensemble",
        description="Evaluate a trained net on labelled images as He et al. 2015 do: on one crop, on 10,\n"
        "or fully convolutionally on whole images at several scales. Several checkpoints make an\n"
        "ensemble, whose scores are the mean of its members'.\n\n"
        f"Images come from a folder with a subfolder for each class, classes in sorted order\n"
        f"({' '.join(SUFFIXES)}), or from an .npz with the arrays\n"
        "images, uint8 [N, H, W, 3], and labels, integers [N]. Size and normalisation are what the\n"
        "checkpoint says, or ImageNet's; CIFAR's nets read 32x32 px. An image that can't be read is\n"
        "reported, counted and left out.",
        example="fusedres eval --model resnet50 --weights IMAGENET1K_V1 --data imagenet/val --crops 10\n"
        "  fusedres eval --model resnet20 --checkpoint resnet20.th --data test.npz --per-class\n"
        "  fusedres eval --model resnet34 --model resnet50 --checkpoint 34.pt --checkpoint 50.pt \\\n"
        "    --data imagenet/val --crops full --json full.json",
    )
    checkpoints.add_source(parser, several=True)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="a folder or an .npz")
    parser.add_argument(
        "--crops",
        choices=("1", "10", "full"),
        default="1",
        help="1: in the centre. 10: four corners and centre, and their mirror images. full: the whole image "
        "at each of --scales, no crop (default: 1)",
    )
    parser.add_argument(
        "--size",
        type=at_least(1),
        metavar="PX",
        help=f"of a crop (default: the checkpoint's, or {IMAGENET.size}, for CIFAR's nets 32)",
    )
    parser.add_argument(
        "--resize",
        type=at_least(1),
        metavar="PX",
        help="shorter side of the image that crops are taken from (default: the checkpoint's, or in "
        f"proportion to the size, as {IMAGENET.shorter} to {IMAGENET.size}; CIFAR's nets, and images of an "
        ".npz that have the net's size, are not cropped)",
    )
    parser.add_argument(
        "--scales",
        type=_scales,
        metavar="PX,PX",
        help=f"shorter sides for --crops full (default: {','.join(map(str, SCALES))})",
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average over mirror images, too (default: with --crops 10, which has them, and full)",
    )
    parser.add_argument(
        "--average",
        choices=("probabilities", "logits"),
        default="probabilities",
        help="what is averaged over views and members (default: probabilities, after the softmax)",
    )
    options.add_device(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32, without TF32")
    parser.add_argument(
        "--batch",
        type=at_least(1),
        default=BATCH,
        metavar="N",
        help=f"images, or views of images, in a call of the net, at most (default: {BATCH})",
    )
    options.add_threads(parser)
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="evaluate N images, at even distances in sorted order (default: all)",
    )
    parser.add_argument("--per-class", action="store_true", help="print a line for each class")
    labels.add_labels(parser, "the subfolders' names; of an .npz ImageNet's for 1000 classes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that is found out")
    return parser


def _scales(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), text.split(",")))


def run(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    _check(args)
    options.check_outputs(args.json)
    options.check_backend(device)
    remedy = "a smaller --batch" + " or --scales" * (args.crops == "full")
    with options.threads(args.threads), out_of_memory(remedy), _without_tf32():
        found = _evaluate(args, device)
    print(render(found, args.per_class))
    if args.json is not None:
        with writing(args.json):
            report.write_json(found, args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that don't go together."""
    if args.crops != "full" and args.scales is not None:
        raise CommandError(f"--scales is for --crops full, got --crops {args.crops}", USAGE)
    if args.crops == "full" and (args.size or args.resize):
        raise CommandError("--crops full has no crops: give --scales instead of --size and --resize", USAGE)
    if args.crops == "10" and args.flip is False:
        raise CommandError("--crops 10 has the mirror images: leave out --no-flip", USAGE)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """cuDNN's fp32 convolutions in fp32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _evaluate(args: argparse.Namespace, device: torch.device) -> Report:
    nets = _load(args)
    classes = nets[0].classes
    data = images.find(args.data, "--data", classes)
    names = labels.names(args.labels, classes) if args.labels or data.names is None else data.names
    data = data if args.limit is None else data.spread(args.limit)
    of_images = torch.as_tensor(data.labels)
    members = [_member(args, trained, data, device) for trained in nets]

    tally = Tally(len(members) + 1, classes)  # the last: of all
    started = time.perf_counter()
    for indices, scores in score(members, data, args.batch, device, args.average == "logits"):
        tally.add(torch.cat([scores, scores.mean(1, keepdim=True)], 1), of_images[indices])
    seconds = time.perf_counter() - started
    read = int(tally.images.sum())
    return {
        "command": args.command_line,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.facts(device),
        "settings": {
            "crops": args.crops,
            "scales": members[0].protocol.scales if args.crops == "full" else None,
            "flip": members[0].protocol.flip,
            "average": args.average,
            "device": device.type,
            "dtype": args.dtype,
            "batch": args.batch,
            "limit": args.limit,
        },
        "data": {"path": str(args.data), "classes": classes, "images": read, "left_out": len(data) - read},
        "members": [
            _described(trained, member.protocol) | tally.figures(side)
            for side, (trained, member) in enumerate(zip(nets, members, strict=True))
        ],
        "result": tally.figures(-1),
        "per_class": tally.per_class(-1, names),
        "seconds": seconds,
        "images_per_second": read / seconds,
    }


def _load(args: argparse.Namespace) -> list[Trained]:
    """The ensemble's nets, on the CPU."""
    nets = checkpoints.load_several(args)
    for other in nets[1:]:
        if other.classes != nets[0].classes:
            raise CommandError(
                f"the nets of an ensemble must have the same classes: {nets[0].source} has "
                f"{nets[0].classes}, {other.source} {other.classes}",
                USAGE,
            )
    return nets


def _member(args: argparse.Namespace, trained: Trained, data: Images, device: torch.device) -> Member:
    protocol = _protocol(args, trained, data)
    # a graph would be captured for every size of an image
    graph: When = False if args.crops == "full" else "auto"
    net = fusedres.optimize_for_inference(trained.net.to(device), DTYPES[args.dtype], cuda_graph=graph)
    return Member(net, trained.source, trained.normalisation, protocol)


def _protocol(args: argparse.Namespace, trained: Trained, data: Images) -> Protocol:
    flip = args.crops != "1" if args.flip is None else args.flip
    if args.crops == "full":
        if args.scales is None and trained.name in build.CIFAR:
            raise CommandError(f"--crops full needs --scales for {trained.name}, a net for CIFAR", USAGE)
        return Protocol("full", trained.format, args.scales or SCALES, flip)
    format = trained.format if args.size is None else trained.format.of_size(args.size)
    if args.resize is not None:
        format = Format(format.size, args.resize)
    elif args.crops == "1":
        format = data.format(format)
    size, shorter = format
    if args.crops == "10" and (shorter is None or shorter <= size):
        given = "" if shorter is None else f", got {shorter}"
        raise CommandError(f"--crops 10 needs a --resize above the crops' size, {size} px{given}", USAGE)
    if shorter is not None and shorter < size:
        raise CommandError(f"--resize must be at least the crop's size, {size} px, got {shorter}", USAGE)
    return Protocol(args.crops, format, (), flip)


def _described(trained: Trained, protocol: Protocol) -> Report:
    mean, std = (
        [round(value, 6) for value in values.flatten().tolist()] if values[0].numel() == 1 else "per pixel"
        for values in (trained.normalisation.mean, trained.normalisation.std)
    )
    cropped = protocol.crops != "full"
    return {
        "model": trained.name,
        "weights": trained.source,
        "zeros": trained.zeros,
        "mean": mean,
        "std": std,
        "size": protocol.format.size if cropped else None,
        "resize": protocol.format.shorter if cropped else None,
    }


def render(found: Report, per_class: bool) -> str:
    """The report as text."""
    settings, data, facts = found["settings"], found["data"], found["machine"]
    left_out = f" ({data['left_out']:,} left out)" if data["left_out"] else ""
    lines = [
        f"{data['images']:,} images of {data['path']}{left_out}, {data['classes']:,} classes, "
        f"{_views(found)}, {settings['dtype']}",
        f"{found['images_per_second']:,.1f} images/s, {facts['device_name']}, {facts['threads']} threads, "
        f"torch {found['versions']['torch']}",
        "",
        *report.aligned(_table(found)),
    ]
    if per_class:
        rows = [("class", "images", *_heads(found))]
        for entry in found["per_class"]:
            tops = [entry[top] for top in found["result"]]
            name = entry["label"] or f"class {entry['class']}"
            rows.append((name, f"{entry['images']:,}", *_cells(tops, entry["images"])))
        lines += ["", *report.aligned(rows)]
    return "\n".join(lines)


def _views(found: Report) -> str:
    settings, first = found["settings"], found["members"][0]
    flip = " and mirror images" if settings["flip"] else ""
    if settings["crops"] == "full":
        return f"whole images with shorter sides of {', '.join(map(str, settings['scales']))} px{flip}"
    crops = "1 crop" if settings["crops"] == "1" else "10 crops"
    of = "" if first["resize"] is None else f" of {first['resize']}"
    return f"{crops}, {first['size']}{of} px{flip if settings['crops'] == '1' else ''}"


def _table(found: Report) -> list[tuple[str, ...]]:
    images, members = found["data"]["images"], found["members"]
    sides = {f"{member['model']}, {member['weights']}": member for member in members}
    if len(members) > 1:
        sides[f"ensemble of {len(members)}, mean of {found['settings']['average']}"] = found["result"]
    rows = [("", *_heads(found))]
    for name, figures in sides.items():
        rows.append((name, *_cells([figures[top]["correct"] for top in found["result"]], images)))
    return rows


def _heads(found: Report) -> list[str]:
    names = {"top1": "top-1", "top5": f"top-{TOP}"}
    return [head for top in found["result"] for head in (names[top], f"{names[top]} err. %")]


def _cells(correct: list[int], images: int) -> list[str]:
    """The number that is right and the error, for every head."""
    cells = []
    for right in correct:
        cells += [f"{right:,}", f"{100 * (images - right) / images:.2f}" if images else "-"]
    return cells
