"""Bytes, FLOP and the least time of a ResNet at every level of fusion.

``python benchmarks/roofline.py --model resnet50 --batch 256`` prints a row for each level.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedres.cli import machine
from fusedres.cli.bench.report import aligned
from fusedres.cli.options import DTYPES, MODELS, at_least, positive_float
from fusedres.cli.roofline import LEVELS, Placed, passes
from fusedres.plan import traffic
from fusedres.plan.conv import BANDWIDTH, FUSED_COST, PEAK, REACHED_BANDWIDTH, REACHED_PEAK

DETAILS = ("net", "block", "layer", "pass")
# levels whose convolutions are all kernels of this project
PREDICTED = ("block", "conv-pool")
_STRIDE = 32
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_SECONDS = 0.5  # of calls

Row = dict[str, Any]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What a training step or inference has to move and to compute at each level of fusion,\n"
        "and the least time for that. Each full tensor counts as often as a pass reads or writes it;\n"
        "vectors of a channel's length don't. Parameters are cast, read, and updated by SGD with momentum\n"
        "once a step. What making the images that convolutions read takes stands apart.\n"
        "Levels marked with * are what runs, the others are roofs:\n"
        + "\n".join(f"  {name:<16}{level.mode}: {level.title}" for name, level in LEVELS.items()),
        epilog="examples:\n"
        "  python benchmarks/roofline.py --model resnet50 --batch 256\n"
        "  python benchmarks/roofline.py --model resnet18 --batch 16 --dtype fp32 --measure\n"
        "  python benchmarks/roofline.py --level block --detail layer --json roofline.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
    parser.add_argument("--batch", type=at_least(1), default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--image-size", type=at_least(_STRIDE), default=224, metavar="PX", help="default: 224"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    parser.add_argument("--level", choices=tuple(LEVELS), action="append", help="default: all of them")
    parser.add_argument(
        "--detail", choices=DETAILS, default="net", help="a row for each of these (default: net)"
    )
    ceilings = parser.add_argument_group("ceilings (default: an H100's, by a copy and a matrix product)")
    ceilings.add_argument("--bandwidth", type=positive_float, metavar="GB/S", help="of memory")
    ceilings.add_argument("--peak", type=positive_float, metavar="TFLOP/S", help="of matrix products")
    ceilings.add_argument(
        "--measure", action="store_true", help="on this machine: by a copy and a matrix product, first"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, pass by pass")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"can't write {args.json}: there is no directory {args.json.parent}")
    ceilings = measured(dtype) if args.measure else _known(dtype)
    if args.bandwidth:
        ceilings |= {"bandwidth": 1e9 * args.bandwidth, "source": "given"}
    if args.peak:
        ceilings |= {"peak": 1e12 * args.peak, "source": "given"}
    settings = {key: getattr(args, key) for key in ("model", "batch", "image_size", "dtype")}
    found = {}
    for level in args.level or LEVELS:
        name = str(dtype).removeprefix("torch.")
        found[level] = passes(level, args.model, args.batch, args.image_size, name)
    print(table(found, settings, ceilings, args.detail))
    if args.json is not None:
        report = {
            "kind": "roofline",
            "settings": settings,
            "ceilings": ceilings,
            "levels": {level: _level(level, of, ceilings) for level, of in found.items()},
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _known(dtype: torch.dtype) -> Row:
    peak = PEAK[str(dtype).removeprefix("torch.")]
    return {"bandwidth": BANDWIDTH, "peak": peak, "source": "an H100 SXM, measured"}


def measured(dtype: torch.dtype) -> Row:
    """Bytes a second that a copy reads and writes, FLOP a second of a matrix product, here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return {
        "bandwidth": 2 * source.numel() / _seconds(lambda: target.copy_(source), device),
        "peak": max(_product(n, dtype, device) for n in _products(device.type)),
        "source": f"measured on {machine.device_name(device)}{threads}",
    }


def _products(device: str) -> tuple[int, ...]:
    return (2048, 4096, 8192) if device == "cuda" else (256, 512, 1024)


def _product(n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: torch.nn.functional.linear(a, b), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of calls in half a second, the first not counted."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < _SECONDS:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def rows(found: Sequence[Placed], ceilings: Row, detail: str) -> list[Row]:
    """Sums over passes that are in the same net, block or layer; or each pass."""
    groups: dict[tuple[object, ...], list[Placed]] = {}
    for index, placed in enumerate(found):
        keys = {
            "net": (),
            "block": (placed.block,),
            "layer": (placed.block, placed.layer, placed.backward),
            "pass": (placed.block, placed.layer, placed.backward, index),
        }
        groups.setdefault(keys[detail], []).append(placed)
    return [_sums(group, ceilings, detail) for group in groups.values()]


def _sums(group: Sequence[Placed], ceilings: Row, detail: str) -> Row:
    bandwidth, peak = ceilings["bandwidth"], ceilings["peak"]
    work = [placed.work for placed in group]
    seconds = [each.seconds(bandwidth, peak) for each in work]
    first = group[0]
    place = {"block": first.block, "layer": first.layer, "backward": first.backward}
    names = {"net": (), "block": ("block",), "layer": tuple(place), "pass": tuple(place)}[detail]
    row: Row = {name: place[name] for name in names}
    if detail == "pass":
        row["op"] = first.work.op
        for key, tensors in (("reads", first.work.reads), ("writes", first.work.writes)):
            row[key] = [{"tensor": tensor.name, "bytes": tensor.bytes} for tensor in tensors]
    row["bytes"] = {
        kind: sum(each.bytes_of(kind) for each in work)
        for kind in (traffic.ACTIVATION, traffic.PARAMETER, traffic.IMAGE)
    }
    row["flop"] = sum(each.flop for each in work)
    row["floor_s"] = sum(seconds)
    by_memory = [s for each, s in zip(work, seconds, strict=True) if each.bytes / bandwidth >= s]
    row["memory_bound_share"] = sum(by_memory) / max(sum(seconds), 1e-30)
    return row


def _level(level: str, found: Sequence[Placed], ceilings: Row) -> Row:
    facts = LEVELS[level]
    report: Row = {"mode": facts.mode, "title": facts.title, "built": facts.built}
    report |= rows(found, ceilings, "net")[0]
    if level in PREDICTED:
        report["predicted_s"] = predicted(found, ceilings)
    return report | {
        f"{detail}es" if detail == "pass" else f"{detail}s": rows(found, ceilings, detail)
        for detail in ("block", "layer", "pass")
    }


def predicted(found: Sequence[Placed], ceilings: Row) -> float:
    """Seconds of a batch if memory and arithmetic reach what cuDNN's convolutions reach on an H100, and a
    fused convolution takes longer than that by ``plan.conv.FUSED_COST``: assumptions, until a GPU has run it.
    """
    bandwidth, peak = ceilings["bandwidth"] * REACHED_BANDWIDTH, ceilings["peak"] * REACHED_PEAK
    return sum(
        placed.work.seconds(bandwidth, peak) * (FUSED_COST if placed.work.flop else 1) for placed in found
    )


def _predictions(found: dict[str, list[Placed]], batch: int, ceilings: Row) -> list[str]:
    lines = []
    for level in PREDICTED:
        if level in found:
            seconds = predicted(found[level], ceilings)
            lines.append(f"{level}: {1e3 * seconds:.1f} ms, {batch / seconds:,.0f} img/s")
    if lines:
        lines = [
            "",
            f"predicted, not measured, if memory reaches {REACHED_BANDWIDTH:.0%} of its ceiling, arithmetic "
            f"{REACHED_PEAK:.0%}, and a fused",
            f"convolution takes {FUSED_COST} times that:",
            *lines,
        ]
    return lines


def table(found: dict[str, list[Placed]], settings: Row, ceilings: Row, detail: str) -> str:
    batch = settings["batch"]
    lines = [
        "{model}, batch {batch}, {image_size} px, {dtype}".format(**settings),
        f"ceilings: {ceilings['bandwidth'] / 1e9:,.1f} GB/s, {ceilings['peak'] / 1e12:,.2f} TFLOP/s "
        f"({ceilings['source']})",
        "MB and GFLOP an image, the least time of a batch",
        "",
    ]
    head = ("activations", "parameters", "images", "MB", "GFLOP", "floor, ms", "by memory")
    if detail == "net":
        shown: list[tuple[str, ...]] = [("level", *head, "img/s")]
        for level, placed in found.items():
            row = rows(placed, ceilings, "net")[0]
            name = f"{level}{'*' if LEVELS[level].built else ''}"
            shown.append((name, *_figures(row, batch), f"{batch / row['floor_s']:,.0f}"))
        return "\n".join(lines + aligned(shown) + _predictions(found, batch, ceilings))
    for level, placed in found.items():
        shown = [(f"{level}, each {detail}", *head)]
        for row in rows(placed, ceilings, detail):
            shown.append((_name(row), *_figures(row, batch)))
        lines += [*aligned(shown), ""]
    return "\n".join(lines[:-1])


def _name(row: Row) -> str:
    parts = [row["block"]]
    if "layer" in row:
        parts.append(f"{row['layer']} {'backward' if row['backward'] else 'forward'}")
    if "op" in row:
        reads, writes = (" ".join(each["tensor"] for each in row[key]) for key in ("reads", "writes"))
        parts.append(f"{row['op']}: {reads} -> {writes or 'vectors'}")
    return ", ".join(parts)


def _figures(row: Row, batch: int) -> tuple[str, ...]:
    moved = row["bytes"]
    return (
        *(f"{size / batch / 1e6:.2f}" for size in (*moved.values(), sum(moved.values()))),
        f"{row['flop'] / batch / 1e9:.2f}",
        f"{1e3 * row['floor_s']:.3f}",
        f"{row['memory_bound_share']:.0%}",
    )


if __name__ == "__main__":
    sys.exit(main())
