"""``fusedres bench``: the fused model against eager PyTorch, with the same weights and input."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from fusedres import ops, plan
from fusedres.cli import machine, options
from fusedres.cli.bench import breakdown, check, eager, measure, plot, report, sides, workload
from fusedres.cli.bench.check import Observed
from fusedres.cli.bench.report import Report
from fusedres.cli.bench.sides import COMPILE, Side
from fusedres.cli.bench.workload import Workload
from fusedres.cli.errors import USAGE, CommandError, first_line, out_of_memory, require, writing
from fusedres.cli.options import DTYPES, LAYOUTS, MODELS, Commands, add_command, at_least
from fusedres.models.build import CIFAR, build

BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 10, "cuda": 50}
# steps of inference are short, and at batch 1 a 99th percentile needs a hundred of them
INFERENCE_ROUNDS = {"cpu": 20, "cuda": 100}
INFERENCE_IMAGES = 120
WARMUP = {"cpu": 2, "cuda": 10}
IMAGE_SIZE, CIFAR_IMAGE_SIZE, CIFAR_CLASSES = 224, 32, 10
CIFAR_MODELS = tuple(name for name in CIFAR if name.startswith("resnet"))
_STRIDE = 32  # of the whole net


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "bench",
        help="measure the fused model against eager PyTorch",
        description="Measure a fused ResNet against eager PyTorch (torchvision's model where that is\n"
        "installed) and, with --compile, against torch.compile of it, with the same weights and input.\n"
        "First both must give the same outputs and gradients; if not, nothing is timed and the\n"
        "status is 1. Then steps alternate, all in this process. Peak memory is that of the tensors\n"
        "which one step makes, page faults are minor ones per step (median), errors are relative to\n"
        "eager PyTorch in a wider type.\n\n"
        "Training is under autocast. In inference every side gets fp32 images, and its weights were\n"
        "converted to --dtype beforehand (autocast would cast them again in every call):\n"
        "  fused        fusedres.optimize_for_inference\n"
        "  eager        the model converted with model.to(dtype)\n"
        "  folded       eager with batch norms folded into the convolutions\n"
        "  compile      with --compile: torch.compile of eager with freezing\n"
        "  onnxruntime  with --peers: ONNX Runtime on a CPU, fp32 only\n"
        "  openvino     with --peers: OpenVINO on a CPU, bf16 or fp32\n"
        "Start-up is the time to the first answer; torch.compile's is shorter if its cache on disk\n"
        "knows the model. Latencies are percentiles of the steps: with fewer than 100, p99 is the\n"
        "longest.",
        example="fusedres bench --model resnet50 --batch 16 --train --json bench.json --plot bench.png\n"
        "  fusedres bench --model resnet50 --batch 1 --inference --compile --peers",
    )
    parser.add_argument(
        "--model",
        choices=(*MODELS, *CIFAR_MODELS),
        default="resnet50",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or of those for CIFAR {', '.join(CIFAR_MODELS)} (default: resnet50)",
    )
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="images in a batch (default: 16, on a GPU 128)"
    )
    parser.add_argument(
        "--image-size",
        type=at_least(_STRIDE),
        metavar="PX",
        help=f"height and width, pixels (default: {IMAGE_SIZE}, of CIFAR's nets {CIFAR_IMAGE_SIZE})",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bf16",
        help="training in bf16 and fp16 is under autocast with fp32 weights (default: bf16)",
    )
    parser.add_argument(
        "--layout", choices=tuple(LAYOUTS), default="channels_last", help="default: channels_last"
    )
    options.add_device(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--mode", choices=("train", "inference", "both"), default="both", help="default: both")
    mode.add_argument("--train", dest="mode", action="store_const", const="train", help="--mode train")
    mode.add_argument(
        "--inference", dest="mode", action="store_const", const="inference", help="--mode inference"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        metavar="N",
        help="timed steps of each side (default: 10, on a GPU 50; in inference 20, on a GPU 100, and more "
        f"where those are fewer than {INFERENCE_IMAGES} images)",
    )
    parser.add_argument(
        "--warmup", type=at_least(1), metavar="N", help="untimed steps before (default: 2, on a GPU 10)"
    )
    options.add_threads(parser)
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile of the eager model, too"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="measure inference by ONNX Runtime and OpenVINO, too, where they are installed",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of weights and input (default: 0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture (needs matplotlib)")
    return parser


def run(args: argparse.Namespace) -> int:
    options.check_outputs(args.json, args.plot)
    if args.plot:
        require("matplotlib", "--plot")
    device = options.device(args.device)
    args.image_size = args.image_size or (CIFAR_IMAGE_SIZE if args.model in CIFAR_MODELS else IMAGE_SIZE)
    for name, defaults in (("batch", BATCH), ("warmup", WARMUP)):
        setattr(args, name, getattr(args, name) or defaults[device.type])
    _check_settings(args, device)
    with options.threads(args.threads), out_of_memory("a smaller --batch"):
        measured = _bench(args, device)
    print(report.table(measured))
    if args.json:
        with writing(args.json):
            report.write_json(measured, args.json)
    if args.plot:
        with writing(args.plot):
            plot.write(measured, args.plot)
    return 0


def _check_settings(args: argparse.Namespace, device: torch.device) -> None:
    if args.peers and args.mode == "train":
        raise CommandError("--peers measures inference: without --train", USAGE)
    if args.peers and device.type != "cpu":
        raise CommandError("--peers measures on the CPU only: add --device cpu", USAGE)
    values = args.batch * (-(-args.image_size // _STRIDE)) ** 2
    if args.mode != "inference" and values < 2:
        raise CommandError(
            "training needs more than one value per channel: a larger --batch or --image-size", USAGE
        )
    if args.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise CommandError(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bf16", USAGE)
    try:
        for op in plan.BN_OPS:
            ops.choice(op, device, DTYPES[args.dtype], ops.forced_backend())
    except RuntimeError as error:
        raise CommandError(str(error)) from error


def _bench(args: argparse.Namespace, device: torch.device) -> Report:
    torch.manual_seed(args.seed)
    classes = CIFAR_CLASSES if args.model in CIFAR_MODELS else workload.CLASSES
    batch = workload.make(
        args.batch, args.image_size, DTYPES[args.dtype], LAYOUTS[args.layout], device, args.seed, classes
    )
    fused = build(args.model, classes)
    plain, origin = eager.build(args.model)
    for model in (fused, plain):
        model.to(device).to(memory_format=LAYOUTS[args.layout])
    workload.prepare(plain, batch.images)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}

    def measured(mode: str) -> Report:
        for model in (fused, plain):
            model.load_state_dict(weights)
            model.train(mode == "train")
        expected = check.reference(plain, batch, mode)
        if mode == "inference":
            found, notes = sides.inference(
                fused, plain, batch, origin=origin, compiled=args.compile, with_peers=args.peers
            )
        else:
            kernels, notes = _choice(batch).implementation, []
            found = sides.training(fused, plain, batch, kernels=kernels, origin=origin, compiled=args.compile)
        return _measure(mode, found, expected, batch, notes, args)

    modes = ("train", "inference") if args.mode == "both" else (args.mode,)
    return {
        "command": args.command_line,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.facts(device),
        "settings": {
            "model": args.model,
            "batch": args.batch,
            "image_size": args.image_size,
            "dtype": args.dtype,
            "layout": args.layout,
            "device": device.type,
            "warmup": args.warmup,
            "seed": args.seed,
            "backend": ops.forced_backend(),
        },
        "results": [measured(mode) for mode in modes],
    }


def _measure(
    mode: str,
    found: dict[str, Side],
    expected: tuple[Observed, Observed],
    batch: Workload,
    notes: list[str],
    args: argparse.Namespace,
) -> Report:
    errors, doubts = _checked(mode, found, expected, batch.dtype)
    steps = {name: side.step for name, side in found.items()}
    rounds = args.rounds or _rounds(mode, batch)
    measure.release_free_memory(batch.device)
    if mode == "inference" and batch.device.type == "cpu":
        samples = measure.take_turns(steps, rounds, args.warmup, mode)
    else:
        samples = measure.interleave(steps, rounds, args.warmup, batch.device, mode)
    seen = {name: side.step for name, side in found.items() if side.profiled}
    parts = {name: breakdown.of(step, batch.device) for name, step in seen.items()}
    peaks = {name: measure.peak_bytes(step, batch.device) for name, step in seen.items()}
    figures = {
        name: report.side(side, samples[name], args.batch, peaks.get(name), errors[name], parts.get(name))
        for name, side in found.items()
    }
    notes = [*notes, *doubts, *_unfused(mode, parts["fused"], batch)]
    return report.result(mode, rounds, figures, parts, notes)


def _rounds(mode: str, batch: Workload) -> int:
    device = batch.device.type
    if mode == "train":
        return ROUNDS[device]
    return max(INFERENCE_ROUNDS[device], -(-INFERENCE_IMAGES // len(batch.images)))


def _checked(
    mode: str, found: dict[str, Side], expected: tuple[Observed, Observed], dtype: torch.dtype
) -> tuple[dict[str, check.Errors], list[str]]:
    """Errors of every side, and notes on those of others than ours; raises if the fused one is wrong."""
    errors = {}
    for name, side in tqdm(found.items(), desc=f"{mode}: check", disable=None, leave=False):
        try:
            errors[name] = check.errors(side.observe(), expected)
        except Exception as error:
            if name == COMPILE:  # anything can go wrong in there, a missing compiler to begin with
                raise CommandError(f"torch.compile failed: {first_line(error)}") from error
            raise
    failures = {name: check.failure(errors[name], errors["eager"], dtype) for name in found}
    wrong = failures.pop("fused")
    if wrong is not None:
        raise CommandError(f"the check failed, nothing was timed: {report.TITLES[mode]}, {wrong}")
    return errors, [
        f"{name} would not pass the check: {failure}" for name, failure in failures.items() if failure
    ]


def _unfused(mode: str, fused: breakdown.Breakdown, batch: Workload) -> list[str]:
    if mode == "train":
        return [] if fused.fused_norm_share > 0 else [f"nothing was fused because: {_choice(batch).reason}"]
    return [] if fused.one_pass_share > 0 else ["no convolution of the fused side took its ReLU in"]


def _choice(batch: Workload) -> plan.Choice:
    return ops.choice("bn_act", batch.device, batch.dtype, ops.forced_backend())
