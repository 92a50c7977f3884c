"""What a benchmark says: one plain dictionary, its table, its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedres.cli.bench.breakdown import Breakdown
from fusedres.cli.bench.check import Errors
from fusedres.cli.bench.measure import Samples
from fusedres.training import files

Report = dict[str, Any]
TITLES = {"train": "training step", "inference": "inference"}


def side(samples: Samples, batch: int, peak_bytes: int, errors: Errors, parts: Breakdown) -> Report:
    """The figures of one implementation in one mode."""
    return {
        "images_per_second": 1e3 * batch / samples.median_ms,
        "ms": {
            "median": samples.median_ms,
            "min": min(samples.ms),
            "max": max(samples.ms),
            "all": samples.ms,
        },
        "peak_bytes": peak_bytes,
        "minor_faults": samples.median_faults,
        "output_error": errors.worst_output,
        "gradient_error": errors.worst_gradient,
        "breakdown_ms": parts.ms,
    }


def result(mode: str, sides: dict[str, Report], parts: dict[str, Breakdown], note: str | None) -> Report:
    """One mode: every implementation, and what follows from comparing them."""
    eager = sides["eager"]["ms"]["median"]
    for figures in sides.values():
        figures["ratio_to_eager"] = eager / figures["ms"]["median"]
    return {
        "mode": mode,
        "implementations": sides,
        "fused_norm_share": parts["fused"].fused_norm_share,
        "fused_convolution_share": parts["fused"].fused_convolution_share,
        "ceiling": parts["eager"].ceiling,
        "note": note,
    }


def table(report: Report) -> str:
    """The report as text, one block for each mode."""
    settings, machine = report["settings"], report["machine"]
    lines = [
        f"{settings['model']}, batch {settings['batch']}, {settings['image_size']} px, {settings['dtype']}, "
        f"{settings['layout']}, {settings['device']}: {machine['device_name']}, {machine['threads']} threads",
        f"fused: {report['fused']}; eager: {report['eager']}; "
        f"torch {report['versions']['torch']}; median of {settings['rounds']} interleaved rounds",
    ]
    for entry in report["results"]:
        lines += ["", *_figures(entry), "", *_breakdown(entry)]
    return "\n".join(lines)


def _figures(entry: Report) -> list[str]:
    rows = [
        (
            TITLES[entry["mode"]],
            "img/s",
            "ms (min to max)",
            "ratio",
            "peak memory",
            "page faults",
            "output error",
            "gradient error",
        )
    ]
    for name, figures in entry["implementations"].items():
        ms, faults, gradient = figures["ms"], figures["minor_faults"], figures["gradient_error"]
        rows.append(
            (
                name,
                f"{figures['images_per_second']:.1f}",
                f"{ms['median']:.1f} ({ms['min']:.1f} to {ms['max']:.1f})",
                f"{figures['ratio_to_eager']:.2f}x",
                f"{figures['peak_bytes'] / 2**20:,.0f} MiB",
                "-" if faults is None else f"{faults:,.0f}",
                f"{figures['output_error']:.1e}",
                "-" if gradient is None else f"{gradient:.1e}",
            )
        )
    return _aligned(rows)


def _breakdown(entry: Report) -> list[str]:
    sides = entry["implementations"]
    rows = [("one profiled step, ms", *sides)]
    for category in sides["eager"]["breakdown_ms"]:
        values = [figures["breakdown_ms"][category] for figures in sides.values()]
        if any(values):
            rows.append((category, *(f"{value:.1f}" if value else "-" for value in values)))
    lines = [
        *_aligned(rows),
        f"share of batch-norm time in fusedres kernels: {_percent(entry['fused_norm_share'])}",
        f"share of convolution time in fusedres kernels: {_percent(entry['fused_convolution_share'])}",
        f"ceiling: {entry['ceiling']:.2f}x eager, if batch norm, ReLU and add cost nothing",
    ]
    return lines if entry["note"] is None else [*lines, f"note: {entry['note']}"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _percent(share: float) -> str:
    """Rounded down: 100% means all of it."""
    return f"{math.floor(100 * share)}%"


def write_json(report: Report, path: Path) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
