"""How cost and memory grow with the batch, the depth, the image size and the threads: JSON lines.

``python benchmarks/scaling.py --out scaling.jsonl`` runs ``fusedres bench`` for every point, each in a
process of its own, and ``fusedres report scaling.jsonl`` draws the curves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fusedres.cli import machine
from fusedres.cli.bench import BATCH, CIFAR_MODELS
from fusedres.cli.options import DTYPES, MODELS, at_least

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (96, 128, 160, 224, 288, 384)
LEAST_CIFAR = 20  # layers
CIFAR_BATCH = 64
_CHECKING = (
    4  # times the memory of a step: the check's step is in a wider type, and keeps two nets' gradients
)
_MEMINFO = Path("/proc/meminfo")

Point = dict[str, Any]  # options of ``fusedres bench``
Row = dict[str, Any]


def sweeps(model: str, batch: int) -> dict[str, list[Point]]:
    """The points of each sweep, in growing order."""
    cores = os.cpu_count() or 1
    threads = sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})
    cifar = [name for name in CIFAR_MODELS if int(name.removeprefix("resnet")) >= LEAST_CIFAR]
    return {
        "batch": [{"model": model, "batch": n} for n in BATCHES],
        "depth": [{"model": name, "batch": batch} for name in MODELS],
        "cifar": [{"model": name, "batch": CIFAR_BATCH} for name in cifar],
        "size": [{"model": model, "batch": batch, "image-size": size} for size in SIZES],
        "threads": [{"model": model, "batch": batch, "threads": n} for n in threads],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure fused against eager at many batches (1 to 256), depths (ResNet-18 to 152, and\n"
        "20 to 1202 for CIFAR), image sizes and numbers of threads, and add a JSON line for each to a\n"
        "file.\n"
        "A point that would not fit into memory, or takes longer than its limit, is left out with the\n"
        "larger ones of its sweep, and the file says so.",
        epilog="example:\n  python benchmarks/scaling.py --sweeps batch,depth --out scaling.jsonl\n"
        "  fusedres report scaling.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweeps", metavar="A,B", help=f"of {', '.join(sweeps('', 1))} (default: all)")
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: resnet50")
    parser.add_argument("--batch", type=at_least(1), metavar="N", help="where it stays (default: bench's)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    parser.add_argument("--mode", choices=("train", "inference"), default="train", help="default: train")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--limit", type=at_least(1), default=300, metavar="S", help="seconds of a point (default: 300)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; is added to")
    return parser


def main(
    argv: Sequence[str] | None = None, points: Callable[[str, int], dict[str, list[Point]]] = sweeps
) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = points(args.model, args.batch or BATCH[device.type])
    names = args.sweeps.split(",") if args.sweeps else list(every)
    for name in names:
        if name not in every:
            parser.error(f"no sweep {name!r}, there are {', '.join(every)}")
    try:
        args.out.open("a").close()
    except OSError as error:
        parser.error(f"can't write {args.out}: {error.strerror}")
    common = {"dtype": args.dtype, "mode": args.mode, "rounds": args.rounds, "warmup": 1}
    for name in names:
        for row in swept(name, every[name], common, args.limit, device):
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(_said(row), flush=True)
    return 0


def swept(
    name: str, points: Sequence[Point], common: Point, limit: float, device: torch.device
) -> Iterator[Row]:
    """A row for each point, up to one that can't be measured."""
    before: tuple[Point, Row] | None = None
    for point in points:
        start, load = time.monotonic(), os.getloadavg()[0]
        why = before and _too_large(point, *before, device)
        row, why = (None, why) if why else _bench(point | common, limit)
        if row is None:
            facts = {
                "machine": machine.facts(device),
                "versions": machine.versions(),
                "point": point | common,
            }
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            yield {"sweep": name, "left_out": why, "date": date, **facts}
            return
        facts = {"cores": os.cpu_count(), "load_before": load, "seconds": round(time.monotonic() - start, 1)}
        yield {"sweep": name, **facts, **row}
        before = point, row


def _too_large(point: Point, smaller: Point, row: Row, device: torch.device) -> str | None:
    """Why a point isn't tried, by the memory of the one before it and how they differ."""
    peaks = [side["peak_bytes"] or 0 for side in row["results"][0]["implementations"].values()]
    needed = _CHECKING * max(peaks) * _size(point) / _size(smaller)
    free = _free(device)
    if free is None or needed <= free:
        return None
    return f"it would take about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"


def _size(point: Point) -> float:
    layers = int(str(point["model"]).removeprefix("resnet"))
    return float(layers * point["batch"] * point.get("image-size", 1) ** 2)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) << 10


def _bench(point: Point, limit: float) -> tuple[Row | None, str | None]:
    """What ``fusedres bench`` writes, or why it doesn't."""
    options = [f"--{name}={value}" for name, value in point.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-P", "-m", "fusedres", "bench", *options, "--json", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return None, f"it took more than {limit:.0f} s"
        if done.returncode < 0:
            return None, f"killed by signal {-done.returncode}"
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        row = json.loads(file.read_text())
    return row | {"command": shlex.join(["fusedres", "bench", *options])}, None


def _said(row: Row) -> str:
    if "left_out" in row:
        point = ", ".join(f"{name} {value}" for name, value in row["point"].items())
        return f"{row['sweep']}: {point}: left out, {row['left_out']}"
    settings, sides = row["settings"], row["results"][0]["implementations"]
    speeds = ", ".join(f"{name} {side['ms']['median']:.1f} ms" for name, side in sides.items())
    return (
        f"{row['sweep']}: {settings['model']}, batch {settings['batch']}, {settings['image_size']} px, "
        f"{row['machine']['threads']} threads: {speeds}"
    )


if __name__ == "__main__":
    sys.exit(main())
