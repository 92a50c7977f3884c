"""The picture of a benchmark: images per second, and where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedres.cli.bench import breakdown
from fusedres.cli.bench.report import TITLES, Report
from fusedres.training import files

SIDES = {
    "fused": "#1b7f5c",
    "eager": "#8a94a6",
    "folded": "#5b6b86",
    "compile": "#c98a2b",
    "onnxruntime": "#9a5b8f",
    "openvino": "#4a7fa5",
}
PARTS = {
    "convolution": "#4c78a8",
    breakdown.ONE_PASS: "#6fa8c9",
    "fusedres convolution": "#2f4b7c",
    "fusedres batch norm": "#1b7f5c",
    breakdown.OWN: "#8cc7ae",
    "batch norm, ReLU": "#e45756",
    "add": "#f2a29b",
    "pool": "#b79ad0",
    "optimizer": "#d8c27a",
    "other": "#c9ced6",
}


def write(report: Report, path: Path) -> None:
    """Draw ``report`` into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results, settings = report["results"], report["settings"]
    heights = [1.6 + 0.5 * len(entry["implementations"]) for entry in results]
    figure = Figure(figsize=(11, 1.1 + sum(heights)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), 2, squeeze=False, height_ratios=heights)
    for entry, (speed, parts) in zip(results, axes, strict=True):
        _speed(speed, entry)
        _parts(parts, entry)
    figure.suptitle(
        f"{settings['model']}, batch {settings['batch']}, {settings['image_size']} px, {settings['dtype']}, "
        f"{settings['layout']}\n{report['machine']['device_name']}, {report['machine']['threads']} threads, "
        f"torch {report['versions']['torch']}, fusedres {report['versions']['fusedres']}",
        fontsize=11,
    )
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _speed(axes: Any, entry: Report) -> None:
    sides = entry["implementations"]
    speeds = [figures["images_per_second"] for figures in sides.values()]
    bars = axes.barh(list(sides), speeds, color=[SIDES[name] for name in sides], height=0.6)
    labels = [f" {f['images_per_second']:.1f}  ({f['ratio_to_eager']:.2f}x)" for f in sides.values()]
    axes.bar_label(bars, labels)
    axes.set_xlim(0, 1.3 * max(speeds))
    axes.set_xlabel("images per second (more is better)")
    axes.set_title(TITLES[entry["mode"]], loc="left", fontweight="bold")
    _tidy(axes)


def _parts(axes: Any, entry: Report) -> None:
    sides = {name: side for name, side in entry["implementations"].items() if side["breakdown_ms"]}
    left = [0.0] * len(sides)
    for part, colour in PARTS.items():
        # a file of an earlier version may lack a part
        widths = [figures["breakdown_ms"].get(part, 0.0) for figures in sides.values()]
        if any(widths):
            axes.barh(list(sides), widths, left=left, color=colour, label=part, height=0.6)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("ms of one profiled step (less is better)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=7.5, frameon=False)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e8ec")
    axes.set_axisbelow(True)
