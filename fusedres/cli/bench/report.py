"""What a benchmark says: one plain dictionary, its table, its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedres.cli.bench.breakdown import Breakdown
from fusedres.cli.bench.check import Errors
from fusedres.cli.bench.measure import Samples
from fusedres.cli.bench.sides import Side
from fusedres.training import files

Report = dict[str, Any]
Column = Callable[[Report], str]
TITLES = {"train": "training step", "inference": "inference"}


_ABSENT = "-"


def side(
    side: Side, samples: Samples, batch: int, peak_bytes: int | None, errors: Errors, parts: Breakdown | None
) -> Report:
    """The figures of one implementation in one mode."""
    return {
        "description": side.description,
        "startup_s": side.startup_s,
        "images_per_second": 1e3 * batch / samples.median_ms,
        "ms": {
            "median": samples.median_ms,
            "min": min(samples.ms),
            "max": max(samples.ms),
            "p50": samples.median_ms,
            "p90": samples.percentile_ms(90),
            "p99": samples.percentile_ms(99),
            "all": samples.ms,
        },
        "peak_bytes": peak_bytes,
        "minor_faults": samples.median_faults,
        "output_error": errors.worst_output,
        "gradient_error": errors.worst_gradient,
        "breakdown_ms": parts and parts.ms,
    }


def result(
    mode: str, rounds: int, sides: dict[str, Report], parts: dict[str, Breakdown], notes: list[str]
) -> Report:
    """One mode: every implementation, and what follows from comparing them."""
    eager = sides["eager"]["ms"]["median"]
    for figures in sides.values():
        figures["ratio_to_eager"] = eager / figures["ms"]["median"]
    if mode == "train":
        shares: Report = {
            "fused_norm_share": parts["fused"].fused_norm_share,
            "fused_convolution_share": parts["fused"].fused_convolution_share,
        }
    else:
        shares = {"one_pass_share": {name: part.one_pass_share for name, part in parts.items()}}
    return {
        "mode": mode,
        "rounds": rounds,
        "implementations": sides,
        **shares,
        "ceiling": parts["eager"].ceiling,
        "notes": notes,
    }


def table(report: Report) -> str:
    """The report as text, one block for each mode."""
    settings, machine = report["settings"], report["machine"]
    lines = [
        f"{settings['model']}, batch {settings['batch']}, {settings['image_size']} px, {settings['dtype']}, "
        f"{settings['layout']}, {settings['device']}: {machine['device_name']}, "
        f"{machine['threads']} threads, torch {report['versions']['torch']}",
    ]
    for entry in report["results"]:
        lines += ["", *_sides(entry), "", *_figures(entry), "", *_breakdown(entry)]
    return "\n".join(lines)


def _sides(entry: Report) -> list[str]:
    title = f"{TITLES[entry['mode']]}, median of {entry['rounds']} interleaved steps"
    return [title, *(f"  {name}: {side['description']}" for name, side in entry["implementations"].items())]


def _figures(entry: Report) -> list[str]:
    columns = _TRAINING if entry["mode"] == "train" else _INFERENCE
    rows = [(TITLES[entry["mode"]], *columns)]
    for name, figures in entry["implementations"].items():
        rows.append((name, *(show(figures) for show in columns.values())))
    return aligned(rows)


def _optional(key: str, show: Callable[[Any], str]) -> Column:
    return lambda figures: _ABSENT if figures[key] is None else show(figures[key])


_SPEED: dict[str, Column] = {"img/s": lambda figures: f"{figures['images_per_second']:.1f}"}
_RATIO: dict[str, Column] = {"ratio": lambda figures: f"{figures['ratio_to_eager']:.2f}x"}
_COSTS: dict[str, Column] = {
    "peak memory": _optional("peak_bytes", lambda size: f"{size / 2**20:,.0f} MiB"),
    "page faults": _optional("minor_faults", lambda faults: f"{faults:,.0f}"),
    "output error": lambda figures: f"{figures['output_error']:.1e}",
}
_TRAINING: dict[str, Column] = {
    **_SPEED,
    "ms (min to max)": lambda figures: "{median:.1f} ({min:.1f} to {max:.1f})".format(**figures["ms"]),
    **_RATIO,
    **_COSTS,
    "gradient error": _optional("gradient_error", lambda error: f"{error:.1e}"),
}
_INFERENCE: dict[str, Column] = {
    **_SPEED,
    "p50 ms": lambda figures: f"{figures['ms']['p50']:.2f}",
    "p90 ms": lambda figures: f"{figures['ms']['p90']:.2f}",
    "p99 ms": lambda figures: f"{figures['ms']['p99']:.2f}",
    **_RATIO,
    "start-up s": _optional("startup_s", lambda seconds: f"{seconds:.1f}"),
    **_COSTS,
}


def _breakdown(entry: Report) -> list[str]:
    sides = {name: side for name, side in entry["implementations"].items() if side["breakdown_ms"]}
    rows = [("one profiled step, ms", *sides)]
    for category in sides["eager"]["breakdown_ms"]:
        values = [figures["breakdown_ms"][category] for figures in sides.values()]
        if any(values):
            rows.append((category, *(f"{value:.1f}" if value else _ABSENT for value in values)))
    return [
        *aligned(rows),
        *_shares(entry),
        f"ceiling: {entry['ceiling']:.2f}x eager, if batch norm, ReLU and add cost nothing",
        *(f"note: {note}" for note in entry["notes"]),
    ]


def _shares(entry: Report) -> list[str]:
    if entry["mode"] == "train":
        return [
            f"share of batch-norm time in fusedres kernels: {_percent(entry['fused_norm_share'])}",
            f"share of convolution time in fusedres kernels: {_percent(entry['fused_convolution_share'])}",
        ]
    shares = ", ".join(f"{name} {_percent(share)}" for name, share in entry["one_pass_share"].items())
    return [f"share of convolution time in one pass with bias, add and ReLU: {shares}"]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _percent(share: float) -> str:
    """Rounded down: 100% means all of it."""
    return f"{math.floor(100 * share)}%"


def write_json(report: Report, path: Path) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
