"""``fusedres report``: result files as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusedres.cli import options
from fusedres.cli.errors import USAGE, CommandError, require, writing
from fusedres.cli.options import Commands, add_command
from fusedres.cli.report import figures, load, page
from fusedres.cli.report.data import Results
from fusedres.training import files


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    parser = add_command(
        commands,
        "report",
        help="make one HTML page of result files",
        description="Make one HTML page of result files, with figures and tables, that needs nothing else.\n"
        "RESULTS are files, or folders that are searched for *.json and *.jsonl, of any mixture of:\n"
        "  fusedres bench --json, fusedres quantize --json\n"
        "  pytest benchmarks --benchmark-only --benchmark-json\n"
        "  benchmarks/gpu_check.py (results.jsonl), benchmarks/scaling.py\n"
        "  JSON lines with other frameworks' throughput and cuDNN's times of layers\n"
        "What can't be read is named, on stderr and in the page; the rest is shown.",
        example="fusedres report benchmarks/results --out report.html --png figures",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="files or folders")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    parser.add_argument(
        "--png", type=Path, metavar="DIR", help="write every figure as a PNG, too (needs matplotlib)"
    )
    parser.add_argument(
        "--title", default="fusedres, measured", metavar="TEXT", help="default: 'fusedres, measured'"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    options.check_outputs(args.out)
    if args.png:
        require("matplotlib", "--png")
        options.check_folder(args.png)
    results = load.load(args.results)
    if not results.machines:
        problems = results.problems or ["no file has any figure"]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CommandError(f"nothing to show: {problems[0]}{more}", USAGE)
    for problem in results.problems:
        print(f"fusedres: warning: {problem}", file=sys.stderr)
    drawn = drawings(results)
    with writing(args.out):
        write_page(results, drawn, args.out, args.title)
    count = sum(map(len, drawn.values()))
    print(f"{args.out}: {count} figures of {len(results.sources)} files")
    if args.png:
        with writing(args.png):
            write_pngs(drawn, args.png)
        print(f"{args.png}: the same as PNGs")
    return 0


def drawings(results: Results) -> dict[str, list[figures.Figure]]:
    """Every figure, by its machine's name."""
    return {machine.name: figures.of(machine) for machine in results.machines.values()}


def write_page(results: Results, drawn: dict[str, list[figures.Figure]], path: Path, title: str) -> None:
    text = page.render(results, drawn, title)
    with files.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pngs(drawn: dict[str, list[figures.Figure]], folder: Path) -> None:
    """A PNG of each (needs matplotlib)."""
    folder.mkdir(parents=True, exist_ok=True)
    for machine, of_machine in drawn.items():
        for figure in of_machine:
            path = folder / f"{page.slug(machine)}-{figure.name}.png"
            (figure.wide or figure.drawing).png(path, machine)
