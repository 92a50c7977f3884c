"""``fusedres quantize``: a trained net in 8 bits, and what that costs and brings."""

from __future__ import annotations

import argparse
import datetime
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres import ops
from fusedres.cli import checkpoints, images, machine, options
from fusedres.cli.bench import measure, report
from fusedres.cli.checkpoints import Trained
from fusedres.cli.errors import USAGE, CommandError, out_of_memory, writing
from fusedres.cli.images import SUFFIXES, Images
from fusedres.cli.options import DTYPES, Commands, add_command, at_least
from fusedres.cli.views import CIFAR, IMAGENET
from fusedres.inference import OptimizedResNet, onednn
from fusedres.inference.quantized import QuantizedConv
from fusedres.training import files

Report = dict[str, Any]
READ = 100  # images at a time, in calibration and evaluation
ROUNDS, WARMUP = 20, 2
EXPORTED = ".pt2"
_EXAMPLES = 2  # images to export with: of one, torch.export would make a constant
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "quantize",
        help="a trained net in 8 bits, with its accuracy before and after",
        description="Quantise the convolutions of a trained ResNet, all but the first, to 8 bits, with\n"
        "scales chosen on calibration images, and compare it with the net before: predictions in fp32,\n"
        "size, images per second in the dtype of what stays in floating point. On the CPU only.\n\n"
        f"Images come from a folder, searched recursively ({' '.join(SUFFIXES)}),\n"
        "or from an .npz with the array images, uint8 [N, H, W, 3]. They are resized to\n"
        f"{IMAGENET.shorter} px on the shorter side and cropped to {IMAGENET.size} px in the centre, for "
        f"CIFAR's nets resized to\n{CIFAR.size}x{CIFAR.size} px, and normalised as ImageNet's, unless the "
        "checkpoint says otherwise; those of\nan .npz that have the net's size are only normalised. An image "
        "that can't be read is reported,\ncounted and left out.\n\n"
        "--out is written by torch.export.save: a graph of PyTorch's own operators with 8-bit weights,\n"
        "for fp32 images [N, 3, size, size], that torch.export.load reads without fusedres. It computes\n"
        "what the 8-bit net computes, but in floating point: it is small, not fast. The speed is that\n"
        "of fusedres.quantize_for_inference in your program.",
        example="fusedres quantize --model resnet50 --checkpoint model.pt --calibration images/ "
        "--out model-int8.pt2\n"
        "  fusedres quantize --model resnet20 --checkpoint resnet20.th --calibration train.npz \\\n"
        "    --evaluate test.npz --layers",
    )
    checkpoints.add_source(parser)
    parser.add_argument(
        "--calibration", type=Path, required=True, metavar="PATH", help="a folder of images or an .npz"
    )
    parser.add_argument(
        "--calibration-images",
        type=at_least(1),
        default=512,
        metavar="N",
        help="the first N in sorted order (default: 512)",
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="PATH",
        help="labelled images: a folder with a subfolder for each class, classes in sorted order, or an .npz "
        "with labels, integers [N] (default: only how many predictions on the calibration images agree)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the first convolution and the classifier (default: bf16 where the CPU has it, else fp32)",
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=16, metavar="N", help="images in a timed batch (default: 16)"
    )
    parser.add_argument(
        "--layers", action="store_true", help="print what each convolution takes in 8 bits and otherwise"
    )
    options.add_threads(parser)
    parser.add_argument("--out", type=Path, metavar=f"FILE{EXPORTED}", help="write the 8-bit net")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that is printed")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.out is not None and args.out.suffix != EXPORTED:
        raise CommandError(f"--out must end in {EXPORTED}, as torch.export.load reads, got {args.out}", USAGE)
    options.check_outputs(args.out, args.json)
    options.check_backend(torch.device("cpu"))
    remedy = "a smaller --batch or --calibration-images"
    with options.threads(args.threads), out_of_memory(remedy):
        trained = checkpoints.load(args.model, args.checkpoint, args.weights, args.zeros)
        found, quantised = _quantize(args, trained)
        print(render(found))
        _write(args, found, quantised, trained.format.size)
    return 0


def _quantize(args: argparse.Namespace, trained: Trained) -> tuple[Report, OptimizedResNet]:
    """Everything that is found out, and the 8-bit net."""
    model, reads = trained.net, (trained.format, trained.normalisation)
    calibration = images.find(args.calibration, "--calibration").first(args.calibration_images)
    tested = args.evaluate and images.find(args.evaluate, "--evaluate", trained.classes)

    seen = [x for x, _ in calibration.batches(READ, "calibration", *reads)]
    before = fusedres.optimize_for_inference(model)
    # both: a ReLU may turn NaN into 0
    if not all(t.isfinite().all() for t in (*before.state_dict().values(), before(seen[0]))):
        raise CommandError(f"{trained.source} gives values that are not finite")
    after = fusedres.quantize_for_inference(model, seen, DTYPES.get(args.dtype))
    # on its first batch, so that what was measured for the layers is of its shape
    speed = _speed(fusedres.optimize_for_inference(model, after.dtype), after, _timed(seen, args.batch))
    layers = _layers(after, seen[0][:1])
    batches: Iterable[tuple[Tensor, Tensor | None]] = (
        tested.batches(READ, "evaluation", *reads) if tested else ((x, None) for x in seen)
    )
    found = {
        "command": args.command_line,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.facts(torch.device("cpu")),
        "settings": {
            "model": trained.name,
            "weights": trained.source,
            "zeros": trained.zeros,
            "dtype": _NAMES[after.dtype],
            "layers": args.layers,
        },
        "calibration": _counted(args.calibration, calibration, sum(map(len, seen))),
        "predictions": _compared(before, after, batches),
        "weights_bytes": {"before": _bytes(before), "after": _bytes(after)},
        "speed": speed,
        "layers": layers,
        "note": _why_not_in_8_bits(),
        "file": None,
    }
    on = tested or calibration
    found["predictions"] |= _counted(on.path, on, found["predictions"]["images"])
    return found, after


def _why_not_in_8_bits() -> str | None:
    """Why no convolution runs in 8 bits here; None where each runs as it is fastest."""
    if ops.forced_backend() == "reference":
        return "FUSEDRES_BACKEND is reference"
    return onednn.quantized_unavailable()


def _counted(path: Path, given: Images, read: int) -> Report:
    return {"path": str(path), "images": read, "left_out": len(given) - read}


def _timed(seen: list[Tensor], batch: int) -> Tensor:
    """[batch, 3, H, W]: calibration images, again from the first where there are fewer"""
    x = torch.cat(seen[: -(-batch // READ)])
    return x[torch.arange(batch) % len(x)].contiguous(memory_format=torch.channels_last)


def _speed(before: nn.Module, after: nn.Module, x: Tensor) -> Report:
    """Both nets in turns on one batch."""
    steps = {"before": lambda: before(x), "after": lambda: after(x)}
    samples = measure.take_turns(steps, ROUNDS, WARMUP, "speed")
    sides = {
        name: {"images_per_second": 1e3 * len(x) / taken.median_ms, "median_ms": taken.median_ms}
        for name, taken in samples.items()
    }
    return {"batch": len(x), "rounds": ROUNDS, **sides}


@torch.inference_mode()
def _layers(net: OptimizedResNet, x: Tensor) -> Report:
    """What each 8-bit convolution took, each way, in the largest part of the batch that was timed."""
    inputs: dict[str, list[int]] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda module, given, out: inputs.update({name: [*given[0].shape[1:]]})

    convolutions = {n: m for n, m in net.net.named_modules() if isinstance(m, QuantizedConv)}
    hooks = [module.register_forward_hook(look(name)) for name, module in convolutions.items()]
    net.net(x.to(net.dtype))
    for hook in hooks:
        hook.remove()
    shape = max(net.measured, key=lambda shape: shape[0])
    measured = net.measured[shape]
    return {
        "images": shape[0],
        "convolutions": [
            {
                "layer": name,
                "input": inputs[name],
                "filters": len(module.weight),
                "kernel": [*module.weight.shape[2:]],
                "stride": [*module.stride],
                "ms": measured.get(name, {}),
                "chosen": min(measured[name], key=measured[name].__getitem__) if name in measured else None,
            }
            for name, module in convolutions.items()
        ],
    }


@torch.inference_mode()
def _compared(before: nn.Module, after: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Report:
    """How many predictions are the same, and right; None for the latter without labels."""
    count = agree = 0
    correct: dict[str, int] = {}
    for x, labels in batches:
        predicted = {"before": before(x).argmax(1), "after": after(x).argmax(1)}
        count += len(x)
        agree += int((predicted["before"] == predicted["after"]).sum())
        if labels is not None:
            for side, classes in predicted.items():
                correct[side] = correct.get(side, 0) + int((classes == labels).sum())
    top1 = {side: right / count for side, right in correct.items()}
    return {"images": count, "agree": agree, "correct": correct or None, "top1": top1 or None}


def _bytes(net: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in net.state_dict().values())


def _write(args: argparse.Namespace, found: Report, net: OptimizedResNet, size: int) -> None:
    if args.out is not None:
        exported = _exported(net, size)
        with writing(args.out), files.atomic(args.out) as temporary:
            temporary.write_bytes(exported)
        found["file"] = {"path": str(args.out), "bytes": len(exported)}
        print(f"wrote {args.out}, {_mib(len(exported))} MiB")
    if args.json is not None:
        with writing(args.json):
            report.write_json(found, args.json)


def _exported(net: OptimizedResNet, size: int) -> bytes:
    """The file of a graph for any number of images of ``size`` px."""
    images = torch.zeros(_EXAMPLES, 3, size, size)
    batch = torch.export.Dim("batch")
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=({0: batch},)), buffer)
    return buffer.getvalue()


def render(found: Report) -> str:
    """The report as text."""
    settings, machine, dtype = found["settings"], found["machine"], found["settings"]["dtype"]
    convolutions = found["layers"]["convolutions"]
    chosen = sum(layer["chosen"] == "int8" for layer in convolutions)
    lines = [
        f"{settings['model']} from {settings['weights']}, {machine['device_name']}, "
        f"{machine['threads']} threads, torch {found['versions']['torch']}",
        f"{len(convolutions)} convolutions in 8 bits, the first and the classifier in {dtype}, "
        f"calibrated on {_images(found['calibration'])}",
        "",
        *report.aligned(_figures(found)),
        "",
        f"same prediction for {found['predictions']['agree']:,} of {_images(found['predictions'])}",
        f"{chosen} of {len(convolutions)} convolutions are faster in 8 bits here; "
        "what isn't runs in floating point",
    ]
    if found["note"]:
        lines[-1] = f"note: {found['note']}, so convolutions run in floating point"
    return "\n".join([*lines, *(_layer_table(found["layers"]) if settings["layers"] else ())])


def _figures(found: Report) -> list[tuple[str, ...]]:
    speed, predictions, sides = found["speed"], found["predictions"], ("before", "after")
    rows: list[tuple[str, ...]] = [("", *sides)]
    if predictions["correct"] is not None:
        correct, top1 = predictions["correct"], predictions["top1"]
        row = f"top-1 of {predictions['images']:,} images, before in fp32"
        rows.append((row, *(f"{correct[side]:,} ({top1[side]:.2%})" for side in sides)))
    sizes = (_mib(found["weights_bytes"][side]) for side in sides)
    rows.append(("MiB of weights, before in fp32", *sizes))
    row = f"images/s in batches of {speed['batch']}, before in {found['settings']['dtype']}"
    rows.append((row, *(f"{speed[side]['images_per_second']:,.1f}" for side in sides)))
    return rows


def _images(counted: Report) -> str:
    left_out = f" ({counted['left_out']:,} left out)" if counted["left_out"] else ""
    return f"{counted['images']:,} images of {counted['path']}{left_out}"


def _layer_table(layers: Report) -> list[str]:
    ways = list(dict.fromkeys(way for layer in layers["convolutions"] for way in layer["ms"]))
    heads = ("layer", "input", "filters", "kernel", "stride", *(f"{way} ms" for way in ways), "chosen")
    rows: list[tuple[str, ...]] = [heads]
    for layer in layers["convolutions"]:
        size, kernel, stride = ("x".join(map(str, layer[key])) for key in ("input", "kernel", "stride"))
        times = (f"{layer['ms'][way]:.3f}" if way in layer["ms"] else "-" for way in ways)
        filters, chosen = str(layer["filters"]), layer["chosen"] or "-"
        rows.append((layer["layer"], size, filters, kernel, stride, *times, chosen))
    return ["", f"each convolution by itself, on {layers['images']} images", *report.aligned(rows)]


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
