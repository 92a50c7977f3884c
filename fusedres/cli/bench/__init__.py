"""``fusedres bench``: the fused model against eager PyTorch, with the same weights and input."""

from __future__ import annotations

import argparse
import copy
import datetime
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import fusedres
from fusedres import ops, plan
from fusedres.cli import machine, options
from fusedres.cli.bench import breakdown, check, eager, measure, plot, report, workload
from fusedres.cli.bench.report import Report
from fusedres.cli.bench.workload import Workload
from fusedres.cli.errors import USAGE, CommandError, first_line, require
from fusedres.cli.options import DTYPES, LAYOUTS, MODELS, Commands, add_command, at_least

BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 10, "cuda": 50}
WARMUP = {"cpu": 2, "cuda": 10}
_STRIDE = 32  # of the whole net
_NO_MEMORY = ("allocate memory", "out of memory", "overflow")


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
        "eager PyTorch in a wider type.",
        example="fusedres bench --model resnet50 --batch 16 --train --json bench.json --plot bench.png",
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="images in a batch (default: 16, on a GPU 128)"
    )
    parser.add_argument(
        "--image-size",
        type=at_least(_STRIDE),
        default=224,
        metavar="PX",
        help="height and width, pixels (default: 224)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bf16",
        help="bf16 and fp16 run under autocast with fp32 weights (default: bf16)",
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
        "--rounds", type=at_least(1), metavar="N", help="timed steps of each side (default: 10, on a GPU 50)"
    )
    parser.add_argument(
        "--warmup", type=at_least(1), metavar="N", help="untimed steps before (default: 2, on a GPU 10)"
    )
    options.add_threads(parser)
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile of the eager model, too"
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
    for name, defaults in (("batch", BATCH), ("rounds", ROUNDS), ("warmup", WARMUP)):
        setattr(args, name, getattr(args, name) or defaults[device.type])
    _check_settings(args, device)
    with options.threads(args.threads):
        try:
            measured = _bench(args, device)
        except (RuntimeError, MemoryError) as error:
            if not any(sign in str(error) for sign in _NO_MEMORY):
                raise
            raise CommandError(f"out of memory, try a smaller --batch: {first_line(error)}") from error
    print(report.table(measured))
    if args.json:
        report.write_json(measured, args.json)
    if args.plot:
        plot.write(measured, args.plot)
    return 0


def _check_settings(args: argparse.Namespace, device: torch.device) -> None:
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
    batch = workload.make(
        args.batch, args.image_size, DTYPES[args.dtype], LAYOUTS[args.layout], device, args.seed
    )
    eager_model, origin = eager.build(args.model)
    models: dict[str, nn.Module] = {"fused": getattr(fusedres, args.model)(), "eager": eager_model}
    for model in models.values():
        model.to(device).to(memory_format=LAYOUTS[args.layout])
    workload.prepare(eager_model, batch.images)
    if args.compile:
        models["compile"] = torch.compile(copy.deepcopy(eager_model))  # type: ignore[assignment]
    weights = {name: value.clone() for name, value in eager_model.state_dict().items()}
    modes = ("train", "inference") if args.mode == "both" else (args.mode,)
    return {
        "command": args.command_line,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": {
            "device_name": machine.device_name(device),
            "cpu_name": machine.cpu_name(),
            "threads": torch.get_num_threads(),
            "environment": machine.environment(),
        },
        "settings": {
            "model": args.model,
            "batch": args.batch,
            "image_size": args.image_size,
            "dtype": args.dtype,
            "layout": args.layout,
            "device": device.type,
            "rounds": args.rounds,
            "warmup": args.warmup,
            "seed": args.seed,
            "backend": ops.forced_backend(),
        },
        "fused": f"fusedres {fusedres.__version__}, {_choice(batch).implementation} kernels",
        "eager": origin,
        "results": [_measure(mode, models, weights, batch, args) for mode in modes],
    }


def _measure(
    mode: str,
    models: dict[str, nn.Module],
    weights: dict[str, torch.Tensor],
    batch: Workload,
    args: argparse.Namespace,
) -> Report:
    for model in models.values():
        getattr(model, "_orig_mod", model).load_state_dict(weights)
        model.train(mode == "train")
    errors = _checked(mode, models, batch)
    make = workload.training_step if mode == "train" else workload.inference_step
    steps = {name: make(model, batch) for name, model in models.items()}
    measure.release_free_memory(batch.device)
    samples = measure.interleave(steps, args.rounds, args.warmup, batch.device, mode)
    parts = {name: breakdown.of(step, batch.device) for name, step in steps.items()}
    sides = {
        name: report.side(
            samples[name], args.batch, measure.peak_bytes(step, batch.device), errors[name], parts[name]
        )
        for name, step in steps.items()
    }
    return report.result(mode, sides, parts, _note(parts["fused"], batch))


def _checked(mode: str, models: dict[str, nn.Module], batch: Workload) -> dict[str, check.Errors]:
    """Errors of every side; raises if the fused one is wrong."""
    expected = check.reference(models["eager"], batch, mode)
    errors = {}
    for name, model in tqdm(models.items(), desc=f"{mode}: check", disable=None, leave=False):
        try:
            errors[name] = check.errors(check.observe(model, batch, mode), expected)
        except Exception as error:
            if name == "compile":  # anything can go wrong in there, a missing compiler to begin with
                raise CommandError(f"torch.compile failed: {first_line(error)}") from error
            raise
    failure = check.failure(errors["fused"], errors["eager"], batch.dtype)
    if failure is not None:
        raise CommandError(f"the check failed, nothing was timed: {report.TITLES[mode]}, {failure}")
    return errors


def _note(fused: breakdown.Breakdown, batch: Workload) -> str | None:
    if fused.fused_norm_share > 0:
        return None
    return f"nothing was fused because: {_choice(batch).reason}"


def _choice(batch: Workload) -> plan.Choice:
    return ops.choice("bn_act", batch.device, batch.dtype, ops.forced_backend())
