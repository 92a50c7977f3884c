"""Everything that a GPU can tell about this package, in one command of under nine minutes.

``python benchmarks/gpu_check.py`` works offline, installs the checkout if it has to, and runs the parts
below in order, the most valuable first, each in a process of its own: one that fails, crashes or hangs
takes no other with it. Every measurement is a line of OUT/results.jsonl at once; OUT/summary.txt is short,
OUT/report.html and the PNGs beside it show what was measured. A new part is a function of a Check, and a
row of PARTS.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import gpu_check_install
from gpu_check_run import END, HEADER, Check, Part, Record, Results, deadline, run_here, run_parts

try:
    import gpu_check_convs
    import gpu_check_figures
    import gpu_check_folded
    import gpu_check_inference
    import gpu_check_jax
    import gpu_check_net
    import gpu_check_ops
    import gpu_check_sanitizer
    import gpu_check_stem
    import torch

    from fusedres import kernels
    from fusedres.cli import machine
except ImportError as error:
    gpu_check_install.install_and_restart(__file__, sys.argv[1:], error)

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 535.0  # seconds
FAILED, USAGE, INTERRUPTED = 1, 2, 130
_MOST_WRONG = 10  # named in the summary of a part

# in order; the seconds add up to less than TOTAL
PARTS = {
    "correct": Part(gpu_check_net.correct, 80, gpu_check_net.show_correct),
    "copy": Part(gpu_check_ops.copy, 15, gpu_check_ops.show_copy),
    # what it finds stays on disk: the parts behind it run with that
    "autotune": Part(gpu_check_convs.tune, 60, gpu_check_convs.show_tune),
    "train": Part(gpu_check_net.train, 50, gpu_check_net.show_train),
    "inference": Part(gpu_check_inference.inference, 40, gpu_check_inference.show_inference),
    "convs": Part(gpu_check_convs.convs, 40, gpu_check_convs.show_convs),
    "folded": Part(gpu_check_folded.folded, 15, gpu_check_convs.show_convs),
    "stem": Part(gpu_check_stem.stem, 10, gpu_check_stem.show_stem),
    "ops": Part(gpu_check_ops.ops, 30, gpu_check_ops.show_ops),
    "compile": Part(gpu_check_net.compiled, 60, gpu_check_net.show_train),
    "frozen": Part(gpu_check_inference.frozen, 35, gpu_check_inference.show_inference),
    "graph": Part(gpu_check_net.graph, 15, gpu_check_net.show_graph),
    "jax": Part(gpu_check_jax.jax_nets, 30, gpu_check_jax.show_jax),
    "sanitizer": Part(gpu_check_sanitizer.sanitizer, 30, gpu_check_sanitizer.show_sanitizer),
    "figures": Part(gpu_check_figures.figures, 25, gpu_check_figures.show_figures),
}
# what a part runs in a process of its own again
WITHIN = {gpu_check_sanitizer.RUN: Part(gpu_check_sanitizer.kernels, 0)}


class CheckError(Exception):
    """What the user can act on, in one line."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"gpu_check: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpu_check.py",
        description="Check and measure the kernels on this machine's GPU, offline, in under nine minutes.",
        epilog="examples:\n"
        "  python benchmarks/gpu_check.py --out results --parts correct,ops\n"
        "  python benchmarks/gpu_check.py --device cpu --tiny --out /tmp/check   (its logic, without a GPU)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: benchmarks/results/<gpu>-<date>; is added to"
    )
    parser.add_argument("--parts", metavar="A,B", help="only these, in the order of --list")
    parser.add_argument("--list", action="store_true", help="list the parts and their limits, and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: runs the logic, in seconds")
    # how a part's process is told what to do
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument(gpu_check_install.OPTION, type=float, help=argparse.SUPPRESS)
    return parser


def main(
    argv: Sequence[str] | None = None,
    parts: Mapping[str, Part] = PARTS,
    script: str = __file__,
    total: float = TOTAL,
) -> int:
    """The command; ``script`` is the file that calls this with ``parts`` when it is run."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    if args.run:
        if args.device == "cpu":  # whatever else runs on the machine: threads that wait for each other crawl
            torch.set_num_threads(1)
        check = Check(args.run, args.device, args.tiny, args.out, deadline(args.limit))
        return run_here({**parts, **WITHIN}[args.run], check)
    if args.list:
        for name, part in parts.items():
            print(f"{name:<10}{part.seconds:>5.0f} s")
        return 0
    try:
        return _check(args, arguments, parts, script, total)
    except CheckError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return error.status


def _check(
    args: argparse.Namespace, arguments: Sequence[str], parts: Mapping[str, Part], script: str, total: float
) -> int:
    chosen = _chosen(args.parts, parts)
    facts = _facts(args.device, args.tiny)
    folder = _folder(args.out, facts["machine"]["device_name"], args.tiny)
    results = Results(folder)
    command_line = shlex.join(["python", "benchmarks/gpu_check.py", *arguments])
    results.add(HEADER, HEADER, command=command_line, parts=list(chosen), installed_s=args.installed, **facts)

    def command(name: str, limit: float) -> list[str]:
        settings = ["--device", args.device, *(["--tiny"] if args.tiny else []), "--out", str(folder)]
        return [sys.executable, script, *settings, "--run", name, "--limit", f"{limit:.1f}"]

    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no part is left running
    try:
        run_parts(chosen, command, folder, total - (args.installed or 0.0))
    except KeyboardInterrupt:
        interrupted = True
    records = results.latest()
    text = summary(records, chosen)
    (folder / "summary.txt").write_text(text)
    print(f"\n{text}\nin {folder}")
    if interrupted:
        return INTERRUPTED
    return 0 if all(record.get("ok", True) for record in records) else FAILED


def _chosen(names: str | None, parts: Mapping[str, Part]) -> dict[str, Part]:
    if names is None:
        return dict(parts)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in parts:
            raise CheckError(f"no part {name!r}, there are {', '.join(parts)}", USAGE)
    return {name: part for name, part in parts.items() if name in wanted}


def _facts(device: str, tiny: bool) -> Record:
    """The header: machine and versions."""
    if device == "cpu" and not tiny:
        raise CheckError("--device cpu needs --tiny: the full sizes are a GPU's", USAGE)
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckError(
            f"no CUDA GPU was found by PyTorch {torch.__version__}; --device cpu --tiny runs without one"
        )
    where = torch.device(device)
    facts = {"device_name": machine.device_name(where), "cpu_name": machine.cpu_name()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(where)
        facts |= {
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
            "driver, clock and power limit": _said(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
            ),
        }
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "tiny": tiny,
        "machine": facts | {"environment": machine.environment()},
        "versions": machine.versions() | {"commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD")},
        "compiled": machine.compiled_module(),
        "unavailable": kernels.unavailable(),
    }


def _said(*command: str) -> str | None:
    """The first line of a program's output; None where it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip()


def _folder(out: Path | None, device_name: str, tiny: bool) -> Path:
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        out = ROOT / "benchmarks" / "results" / f"{slug}-{date}{'-tiny' if tiny else ''}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("results.jsonl", "summary.txt"):
            (out / name).open("a").close()
    except OSError as error:
        raise CheckError(f"can't write into {out}: {error.strerror}") from error
    return out.resolve()


def summary(records: Sequence[Record], parts: Mapping[str, Part]) -> str:
    """A run in a page."""
    header = records[0]
    versions = header["versions"]
    lines = [
        f"{header['machine']['device_name']}, {header['date']}{', tiny shapes' if header['tiny'] else ''}",
        ", ".join(f"{name} {versions[name]}" for name in ("fusedres", "torch", "cuda", "triton")),
    ]
    for name, part in parts.items():
        of_part = [record for record in records if record["part"] == name]
        found = [record for record in of_part if record["name"] != END]
        ends = [record for record in of_part if record["name"] == END]
        state = "interrupted" if not ends else ends[0]["error"] or f"done in {ends[0]['seconds']:.0f} s"
        wrong = [record for record in found if not record.get("ok", True)]
        lines += ["", f"{name}: {state}{f', {len(wrong)} WRONG' if wrong else ''}"]
        lines += [f"  {line}" for line in part.show(found)]
        lines += [f"  WRONG: {_what(record)}: {record.get('error')}" for record in wrong[:_MOST_WRONG]]
    return "\n".join(lines) + "\n"


def _what(record: Record) -> str:
    facts = (record.get(key) for key in ("name", "variant", "shape", "dtype", "implementation"))
    return " ".join(str(fact) for fact in facts if fact)


if __name__ == "__main__":
    sys.exit(main())
