"""``fusedres autotune``: measure every launch setting of a model's convolutions, and keep the best."""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import fusedres
from fusedres import autotune, ops, plan
from fusedres.cli import options
from fusedres.cli.bench import workload
from fusedres.cli.errors import FAILED, CommandError
from fusedres.cli.options import DTYPES, MODELS, Commands, add_command, at_least


class Result(NamedTuple):
    """What was measured for one convolution."""

    op: str
    conv: plan.Conv
    measured: plan.Measured


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "autotune",
        help="measure the convolutions of a model on this GPU",
        description="Measure every launch setting of the fused convolutions, and PyTorch's own, on a\n"
        "model's shapes, and keep the best on disk for this GPU and these versions. Without it\n"
        "the first use of a shape measures one setting against PyTorch's own.",
        example="fusedres autotune resnet50 --batch 256 --dtype bf16",
    )
    parser.add_argument("model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--batch", type=at_least(1), default=256, metavar="N", help="images (default: 256)")
    parser.add_argument("--image-size", type=at_least(1), default=224, metavar="PX", help="default: 224")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    parser.add_argument(
        "--mode", choices=("train", "inference", "both"), default="both", help="default: both"
    )
    options.add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    device = options.device(args.device)
    _check(device, DTYPES[args.dtype])
    model = getattr(fusedres, args.model)().to(device, memory_format=torch.channels_last).train()
    batch = workload.make(
        args.batch, args.image_size, DTYPES[args.dtype], torch.channels_last, device, seed=0
    )
    results: list[Result] = []
    with tqdm(desc="measured", unit=" convolutions", disable=None, leave=False) as bar:

        def watch(op: str, conv: plan.Conv, measured: plan.Measured) -> None:
            results.append(Result(op, conv, measured))
            bar.set_postfix_str(f"{op} {conv}")
            bar.update()

        try:
            with autotune.searching(watch):
                if args.mode != "inference":
                    workload.training_step(model, batch)()
                if args.mode != "train":
                    fusedres.optimize_for_inference(model.eval(), batch.dtype, batch.images)
        except torch.OutOfMemoryError as error:
            raise CommandError(
                f"no memory for {args.batch} images of {args.image_size} px (try a smaller --batch)"
            ) from error
    file = autotune.path(torch.cuda.get_device_name(device))
    if args.json:
        print(json.dumps({"file": str(file), "measured": [_plain(r) for r in results]}, indent=2))
    else:
        print(table(results))
        print(f"\nkept in {file}")
    return 0


def _check(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        raise CommandError(
            f"autotune measures fused convolutions, and there are none for a {device.type} device "
            "(what runs there are rules: see fusedres info)",
            FAILED,
        )
    if ops.forced_backend() != "auto":
        raise CommandError(f"nothing to choose: FUSEDRES_BACKEND forces {ops.forced_backend()}", FAILED)
    if torch.are_deterministic_algorithms_enabled():
        raise CommandError("nothing is measured under torch.use_deterministic_algorithms", FAILED)
    choice = ops.choice("conv_fwd", device, dtype, "auto")
    if not choice.open:
        raise CommandError(f"there are no fused convolutions: {choice.reason}", FAILED)


def _plain(result: Result) -> dict[str, Any]:
    return {"op": result.op, "conv": result.conv._asdict(), **result.measured._asdict()}


def table(results: list[Result]) -> str:
    """One line a convolution: the best way, its time, and PyTorch's."""
    rows = [("op", "convolution", "best", "us", "aten us", "ratio")]
    for op, conv, (_, us, _) in results:
        best = min(us, key=us.__getitem__)
        aten = us[autotune.ATEN]
        rows.append((op, str(conv), best, f"{us[best]:.1f}", f"{aten:.1f}", f"{aten / us[best]:.2f}x"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
