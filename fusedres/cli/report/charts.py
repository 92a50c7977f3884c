"""The kinds of figures: bars, bars against a floor, a roofline, curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedres.cli.report.drawing import SMALL, Drawing, text_width

WIDTH = 360.0
_ROW, _BAR, _GAP = 19.0, 11.0, 12.0
_BASE = 9.5  # of a row's text below its top
_BOLD = 1.15  # of a width
_OUTLIER, _BEYOND = 2.5, 1.25


@dataclass(frozen=True)
class Bar:
    """A value with its name; ``floor`` is the least that it could be."""

    name: str
    value: float
    role: str
    text: str
    floor: float | None = None


@dataclass(frozen=True)
class Group:
    """Bars under a title; an empty one has none."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Point:
    """On a roofline: FLOP a byte, FLOP a second."""

    name: str
    intensity: float
    flops: float
    role: str


@dataclass(frozen=True)
class Curve:
    """A line through values of y at x."""

    name: str
    role: str
    points: Sequence[tuple[float, float]]


def bars(title: str, groups: Sequence[Group], unit: str = "", width: float = WIDTH) -> Drawing:
    """Horizontal bars from 0; with ``unit`` a line at 1 that says what it stands for."""
    drawing = Drawing(title, width)
    every = [bar for group in groups for bar in group.bars]
    left = min(max(text_width(bar.name) for bar in every) + 8, 0.56 * width)
    room = _BOLD * max(text_width(bar.text) for bar in every) + 8
    most = _extent(every)
    scale = (width - left - room) / most
    y = 2.0
    if unit:
        drawing.text("muted", left + scale, 10, unit, "middle", SMALL)
        y = 18.0
    top = y
    for group in groups:
        if group.title:
            drawing.text("strong", 0, y + _BASE, _shortened(group.title, width / _BOLD))
            y += _ROW
        for bar in group.bars:
            _bar(drawing, bar, y, left, scale, most)
            y += _ROW
        y += _GAP
    drawing.height = y - _GAP
    if unit:
        drawing.line("unit", left + scale, top - 2, left + scale, drawing.height)
    drawing.marks.sort(key=lambda mark: mark.kind == "text")  # on top
    return drawing


def _extent(bars: Sequence[Bar]) -> float:
    """Of the axis: one bar that is much longer than all others is cut off."""
    values = sorted(max(bar.value, bar.floor or 0) for bar in bars)
    if len(values) > 2 and values[-1] > _OUTLIER * values[-2]:
        return values[-2] * _BEYOND
    return values[-1]


def _bar(drawing: Drawing, bar: Bar, y: float, left: float, scale: float, most: float) -> None:
    text = "fused" if bar.role == "fused" else "ink"
    drawing.text(text, 0, y + _BASE, _shortened(bar.name, left - 8))
    tip = f"{bar.name}: {bar.text}"
    length = scale * min(bar.value, most)
    drawing.rect(bar.role, left, y, length, _BAR, tip, name=bar.name, value=f"{bar.value:.6g}")
    if bar.value > most:
        drawing.rect("paper", left + length - 14, y - 1, 4, _BAR + 2)
    end = length
    if bar.floor is not None:
        at = left + scale * bar.floor
        drawing.line("floor", at, y - 2, at, y + _BAR + 2)
        end = max(length, scale * bar.floor)
    drawing.text("fused" if bar.role == "fused" else "muted", left + end + 6, y + _BASE, bar.text)


def _shortened(text: str, room: float) -> str:
    if text_width(text) <= room:
        return text
    return text[: max(int(room / text_width("x")) - 1, 1)] + "…"


def roofline(title: str, points: Sequence[Point], bandwidth: float, peak: float, width: float) -> Drawing:
    """Achieved FLOP a second over FLOP a byte, under what memory and arithmetic allow."""
    drawing = Drawing(title, width, (0.4 if width > WIDTH else 0.86) * width)
    left, right, top, bottom = 46.0, width - 12, 18.0, drawing.height - 34
    xs = [point.intensity for point in points] + [peak / bandwidth]
    x_range = _decades(min(xs), max(xs))
    y_range = _decades(min(point.flops for point in points), peak)

    def x(value: float) -> float:
        return left + (right - left) * _fraction(value, x_range)

    def y(value: float) -> float:
        return bottom - (bottom - top) * _fraction(value, y_range)

    for value in _ticks(x_range):
        drawing.line("grid", x(value), top, x(value), bottom)
        drawing.text("muted", x(value), bottom + 15, f"{value:g}", "middle", SMALL)
    for value in _ticks(y_range):
        drawing.line("grid", left, y(value), right, y(value))
        drawing.text("muted", left - 6, y(value) + 4, f"{value / 1e12:g}", "end", SMALL)
    ridge = peak / bandwidth
    start = max(x_range[0], y_range[0] / bandwidth)
    drawing.path(
        "roof", (x(start), y(start * bandwidth)), (x(ridge), y(peak)), (x(max(x_range[1], ridge)), y(peak))
    )
    drawing.text("muted", x(max(x_range[1], ridge)), y(peak) - 6, f"{peak / 1e12:.0f} TFLOP/s", "end", SMALL)
    middle = math.sqrt(start * ridge)
    slope = f"{bandwidth / 1e12:.2f} TB/s"
    drawing.text("muted", x(middle) - 8, y(middle * bandwidth) - 6, slope, "end", SMALL)
    for point in points:
        tip = f"{point.name}: {point.flops / 1e12:.3g} TFLOP/s at {point.intensity:.3g} FLOP a byte"
        place = (x(point.intensity), y(point.flops))
        drawing.circle(point.role, *place, 3.5, tip, name=point.name, value=f"{point.flops:.6g}")
    drawing.text("muted", 0, 10, "TFLOP/s", size=SMALL)
    drawing.text("muted", right, drawing.height - 3, "FLOP a byte", "end", SMALL)
    return drawing


def curves(title: str, lines: Sequence[Curve], x_name: str, y_name: str, width: float = WIDTH) -> Drawing:
    """Lines over an axis of x that doubles, and one of y from 0."""
    drawing = Drawing(title, width, 0.68 * width)
    left, right, top, bottom = 46.0, width - 78, 26.0, drawing.height - 34
    xs = sorted({x for line in lines for x, _ in line.points})
    most = max(y for line in lines for _, y in line.points)
    step = _step(most)
    ceiling = step * math.ceil(most / step - 1e-9)
    span = math.log2(xs[-1] / xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (right - left) * math.log2(x / xs[0]) / span
        return across, bottom - (bottom - top) * y / ceiling

    for index in range(round(ceiling / step) + 1):
        _, y = place(xs[0], index * step)
        drawing.line("grid", left, y, right, y)
        drawing.text("muted", left - 6, y + 4, f"{index * step:g}", "end", SMALL)
    for value in _apart(xs, lambda value: place(value, 0)[0]):
        drawing.text("muted", place(value, 0)[0], bottom + 15, f"{value:g}", "middle", SMALL)
    for line in sorted(lines, key=lambda line: line.role == "fused"):  # on top
        drawing.path(line.role, *(place(x, y) for x, y in line.points))
        for x, y in line.points:
            tip = f"{line.name}, {x_name} {x:g}: {y:.4g} {y_name}"
            drawing.circle(line.role, *place(x, y), 3, tip, name=line.name, value=f"{y:.6g}", at=f"{x:g}")
    ends: list[float] = []
    for line in sorted(lines, key=lambda line: line.points[-1][1], reverse=True):
        across, down = place(*line.points[-1])
        down = max([down + 4, *(end + 14 for end in ends[-1:])])
        ends.append(down)
        drawing.text("fused" if line.role == "fused" else "ink", across + 8, down, _shortened(line.name, 72))
    drawing.text("muted", 0, 10, y_name, size=SMALL)
    drawing.text("muted", right, drawing.height - 3, x_name, "end", SMALL)
    return drawing


def _apart(values: Sequence[float], place: Callable[[float], float]) -> list[float]:
    """Those whose labels don't run into each other."""
    kept: list[float] = []
    for value in values:
        if not kept or place(value) - place(kept[-1]) >= text_width(f"{value:g}00", SMALL):
            kept.append(value)
    return kept


def _decades(least: float, most: float) -> tuple[float, float]:
    """Around values, on a logarithmic axis, with some room."""
    return least / 1.6, most * 1.35


def _fraction(value: float, around: tuple[float, float]) -> float:
    return math.log(value / around[0]) / math.log(around[1] / around[0])


def _ticks(around: tuple[float, float]) -> list[float]:
    low, high = (math.floor(math.log10(value)) for value in around)
    found = [m * 10.0**power for power in range(low, high + 1) for m in (1, 2, 5)]
    inside = [value for value in found if around[0] <= value <= around[1]]
    if len(inside) <= 7:
        return inside
    return [value for value in inside if f"{value:e}"[0] == "1"]


def _step(most: float) -> float:
    """Of an axis from 0 with about four lines."""
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
