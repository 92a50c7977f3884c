"""The figures of one machine, each with what it says above it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusedres.cli.report import charts
from fusedres.cli.report.charts import WIDTH, Bar, Curve, Group, Point
from fusedres.cli.report.data import (
    EAGER,
    FUSED,
    Comparison,
    LayerTime,
    Machine,
    Side,
    net_title,
    threads_title,
)
from fusedres.cli.report.drawing import Drawing
from fusedres.cli.roofline import LEVELS, passes
from fusedres.models.build import CIFAR

MODES = {"train": "Training", "inference": "Inference"}
ROOF = "roof"
_WIDER = 1120.0
_LONG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MOST_OPS = 24
_LEAST_POINTS, _LEAST_OF_SWEEP = 3, 2  # of a curve
_MIB = 2**20
_DIRECTIONS = (
    *("forward", "dgrad", "wgrad"),
    *("conv_fwd", "conv_dgrad", "conv_wgrad", "conv_bias_act", "bottleneck_infer"),
    *("stem_conv", "stem_wgrad", "stem_bias_act"),
)


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading and caption; ``wide`` is the same for a wide page."""

    name: str
    title: str
    caption: str
    drawing: Drawing
    wide: Drawing | None = None


def of(machine: Machine) -> list[Figure]:
    """Every figure that there are data for."""
    found = [figure for mode in MODES for figure in (_speed(machine, mode),) if figure]
    found += [figure for figure in (_quantised(machine),) if figure]
    found += [figure for mode in MODES for figure in (_memory(machine, mode),) if figure]
    found += _scaling(machine)
    directions = {(layer.direction, layer.dtype) for layer in machine.layers}
    found += [_layers(machine, *direction) for direction in sorted(directions, key=_in_order)]
    found += [figure for figure in (_roofline(machine), _ops(machine)) if figure]
    return found


def _in_order(direction: tuple[str, str]) -> tuple[int, str]:
    """As in _DIRECTIONS, what isn't there at the end; bf16 first."""
    op, dtype = direction
    return (_DIRECTIONS.index(op) if op in _DIRECTIONS else len(_DIRECTIONS)), dtype


def sorted_comparisons(machine: Machine, mode: str) -> list[Comparison]:
    def key(each: Comparison) -> tuple[object, ...]:
        return depth(each.net) or 0, each.net, each.image_size or 0, each.dtype, each.threads or 0, each.batch

    return sorted((each for each in machine.comparisons if each.mode == mode), key=key)


def title_of(each: Comparison, machine: Machine) -> str:
    """With what differs among the runs on a machine."""
    of_mode = [o for o in machine.comparisons if (o.mode, o.sweep) == (each.mode, each.sweep)]
    more = ""
    if len({other.image_size for other in of_mode}) > 1 and each.image_size:
        more += f", {each.image_size} px"
    if len({other.threads for other in of_mode}) > 1 and each.threads:
        more += f", {threads_title(each.threads)}"
    if each.sweep:
        more += ", of a curve"
    return each.title + more


def family(net: str) -> str:
    """What nets of several depths have in common."""
    return "CIFAR ResNet" if net in CIFAR else net_title(net).rstrip("-0123456789")


def depth(net: str) -> int | None:
    match = re.search(r"(\d+)$", net)
    return int(match[1]) if match else None


def _speed(machine: Machine, mode: str) -> Figure | None:
    groups = []
    compared = [each for each in sorted_comparisons(machine, mode) if not each.sweep]
    for each in compared:
        sides = [side for side in each.sides if side.ratio is not None]
        if len(compared) > 1:  # the line at 1 is eager's
            sides = [side for side in sides if side.role != EAGER]
        sides.sort(key=lambda side: (side.role != FUSED, -(side.ratio or 0)))
        if sides:
            groups.append(Group(title_of(each, machine), [_ratio(side, machine.by_others) for side in sides]))
    if not groups:
        return None
    caption = "Images per second, as a multiple of eager PyTorch's in the same run."
    roofs = _roofs(machine, compared) if machine.by_others else None
    if roofs:
        groups.append(roofs)
        caption = (
            "Images per second, as a multiple of eager PyTorch's. Dashed: what bandwidth and arithmetic of "
            "this machine would allow at each level of fusion, computed, not measured."
        )
    title = f"{MODES[mode]}: speed"
    return Figure(f"speed-{mode}", title, caption, charts.bars(title, groups, "eager = 1"))


def _ratio(side: Side, with_speed: bool) -> Bar:
    text = f"{side.ratio:.2f}×"
    if with_speed:
        text = f"{side.images_per_second:,.0f}/s"
    return Bar(side.name, side.ratio or 0.0, side.role, text)


def _roofs(machine: Machine, compared: Sequence[Comparison]) -> Group | None:
    """Of the first net that it knows: images per second by the least time of every fused level."""
    known = [each for each in compared if re.fullmatch(r"resnet(18|34|50|101|152)", each.net)]
    if not known or not machine.bandwidth or not machine.peak:
        return None
    each = known[0]
    eager = next((side for side in each.sides if side.role == EAGER), None)
    levels = [name for name, level in LEVELS.items() if level.mode == each.mode]
    bars = []
    for name in levels:
        if "eager" in name or name == "compile" or eager is None:
            continue
        found = passes(name, each.net, each.batch, each.image_size or 224, _LONG[each.dtype])
        seconds = sum(placed.work.seconds(machine.bandwidth, machine.peak) for placed in found)
        speed = each.batch / seconds
        bars.append(Bar(LEVELS[name].title, speed / eager.images_per_second, ROOF, f"{speed:,.0f}/s"))
    return Group("Roofs", bars) if bars else None


def _memory(machine: Machine, mode: str) -> Figure | None:
    groups = []
    for each in sorted_comparisons(machine, mode):
        sides = [side for side in each.sides if side.peak_bytes and not each.sweep]
        bars = [
            Bar(side.name, (side.peak_bytes or 0) / _MIB, side.role, f"{(side.peak_bytes or 0) / _MIB:,.0f}")
            for side in sides
        ]
        if bars:
            groups.append(Group(title_of(each, machine), bars))
    if not groups:
        return None
    title = f"{MODES[mode]}: memory"
    caption = "Peak of a step, MiB, on top of weights and input. Less is better."
    if machine.by_others:
        caption = "Peak, MiB; with a CUDA graph its own memory is not in it. Less is better."
    return Figure(f"memory-{mode}", title, caption, charts.bars(title, groups))


def _quantised(machine: Machine) -> Figure | None:
    groups = []
    for each in machine.quantised:
        weights = f"{each.bytes_before / _MIB:.0f} → {each.bytes_after / _MIB:.0f} MiB"
        after = each.after / each.before
        groups.append(
            Group(
                f"{net_title(each.net)}, batch {each.batch}, {weights}",
                [
                    Bar("8 bits", after, FUSED, f"{after:.2f}×"),
                    Bar(each.dtype, 1.0, "peer", f"{each.before:,.1f}/s"),
                ],
            )
        )
    if not groups:
        return None
    title = "Inference in 8 bits"
    caption = "Images per second over those of the same net in floating point; both by fusedres."
    return Figure("quantised", title, caption, charts.bars(title, groups, ""))


class Varied(NamedTuple):
    """Something that takes several values while all else stays."""

    name: str
    unit: str
    sweeps: tuple[str, ...]  # that vary it
    of: Callable[[Comparison], float | None]
    rest: Callable[[Comparison], tuple[object, ...]]
    where: Callable[[Comparison], str]


_VARIED = (
    Varied(
        "batch",
        "images",
        ("batch",),
        lambda each: each.batch,
        lambda each: (each.net, each.image_size, each.threads),
        lambda each: f"{net_title(each.net)}, {each.dtype}",
    ),
    Varied(
        "depth",
        "layers",
        ("depth", "cifar"),
        lambda each: depth(each.net),
        lambda each: (family(each.net), each.batch, each.image_size, each.threads),
        lambda each: f"{family(each.net)}, batch {each.batch}, {each.dtype}",
    ),
    Varied(
        "image size",
        "pixels",
        ("size",),
        lambda each: each.image_size,
        lambda each: (each.net, each.batch, each.threads),
        lambda each: f"{net_title(each.net)}, batch {each.batch}, {each.dtype}",
    ),
    Varied(
        "threads",
        "threads",
        ("threads",),
        lambda each: each.threads,
        lambda each: (each.net, each.batch, each.image_size),
        lambda each: f"{net_title(each.net)}, batch {each.batch}, {each.dtype}",
    ),
)
_MEASURES: dict[str, tuple[str, Callable[[Side], float]]] = {
    "time": ("ms an image", lambda side: 1e3 / side.images_per_second),
    "memory": ("MiB", lambda side: (side.peak_bytes or 0) / _MIB),
}


def _scaling(machine: Machine) -> list[Figure]:
    """Curves over whatever takes several values while all else stays."""
    found: dict[str, Figure] = {}
    for varied in _VARIED:
        alike: dict[tuple[object, ...], list[Comparison]] = {}
        for each in sorted(machine.comparisons, key=lambda each: not each.sweep):
            if varied.of(each) is not None and each.sweep in ("", *varied.sweeps):
                of_sweep = (each.sweep, each.mode, each.dtype)
                alike.setdefault((*of_sweep, *varied.rest(each)), []).append(each)
        for (sweep, *_), runs in alike.items():
            for measure, (unit, value) in _MEASURES.items():
                lines = _curves(runs, varied.of, value, _LEAST_OF_SWEEP if sweep else _LEAST_POINTS)
                if lines:
                    figure = _curve_figure(runs[0], varied, measure, unit, lines)
                    found.setdefault(figure.name, figure)  # a sweep's, if there are both
    return list(found.values())


def _curve_figure(one: Comparison, varied: Varied, measure: str, unit: str, lines: Sequence[Curve]) -> Figure:
    title = f"{MODES[one.mode]}: {measure} by {varied.name}"
    where = varied.where(one)
    name = re.sub(r"[^a-z0-9]+", "-", f"{title} {where}".lower())
    threads = None if varied.name == "threads" else threads_title(one.threads)
    caption = ", ".join(part for part in (where, threads) if part)
    return Figure(name, title, f"{caption}. Less is better.", charts.curves(title, lines, varied.unit, unit))


def _curves(
    family: Sequence[Comparison],
    value: Callable[[Comparison], float | None],
    measure: Callable[[Side], float],
    least: int,
) -> list[Curve]:
    points: dict[tuple[str, str], dict[float, float]] = {}
    for each in family:
        for side in each.sides:
            x, y = value(each), measure(side)
            if x is not None and y > 0:
                points.setdefault((side.name, side.role), {})[x] = y
    return [
        Curve(name, role, sorted(of_side.items()))
        for (name, role), of_side in points.items()
        if len(of_side) >= least
    ]


def _layers(machine: Machine, direction: str, dtype: str) -> Figure:
    layers = [each for each in machine.layers if (each.direction, each.dtype) == (direction, dtype)]
    groups = []
    for layer in layers:
        bars = [_layer_bar(layer, role) for role in layer.ms]
        groups.append(Group(f"{layer.label}, {layer.count}×" if len(bars) > 1 else "", bars))
    ours = any(FUSED in layer.ms for layer in layers)
    if not ours:  # one bar each: a row with the layer's name
        groups = [Group("", [bar for group in groups for bar in group.bars])]
    who = "fused, and in grey of PyTorch's convolution alone" if ours else "cuDNN's convolution"
    title = f"Layers: {direction}, {dtype}"
    caption = f"Time of {who}, and the share that memory or arithmetic needs of it (the mark)."
    drawing = charts.bars(title, groups)
    return Figure(f"layers-{direction}-{dtype}", title, caption, drawing)


def _layer_bar(layer: LayerTime, role: str) -> Bar:
    ms = layer.ms[role]
    name = ("fused" if role == FUSED else "PyTorch") if len(layer.ms) > 1 else layer.label
    return Bar(name, ms, role, f"{1e3 * ms:.0f} µs {layer.floor_ms / ms:.0%}", layer.floor_ms)


def _roofline(machine: Machine) -> Figure | None:
    layers = [layer for layer in machine.layers if layer.dtype != "fp32"]
    if not layers or not machine.bandwidth or not machine.peak:
        return None
    bandwidth, peak = machine.bandwidth, machine.peak
    points = [
        Point(f"{layer.label} {layer.direction}", layer.flop / layer.bytes, 1e3 * layer.flop / ms, role)
        for layer in layers
        for role, ms in sorted(layer.ms.items(), reverse=True)  # ours on top
    ]
    peak = max(peak, *(point.flops for point in points))
    title = "Roofline of the convolutions"
    caption = (
        f"Each dot a layer in one direction, under {bandwidth / 1e12:.2f} TB/s and {peak / 1e12:.0f} TFLOP/s "
        f"({machine.ceilings}). Bytes are those that a perfect cache would leave."
    )
    narrow, wide = (charts.roofline(title, points, bandwidth, peak, width) for width in (WIDTH, _WIDER))
    return Figure("roofline", title, caption, narrow, wide)


def _ops(machine: Machine) -> Figure | None:
    if not machine.ops:
        return None
    shown = machine.ops[:_MOST_OPS]
    bars = [
        Group(
            op.label,
            [_op_bar("fused", op.ratio, FUSED)]
            + [_op_bar(name, ratio, "peer") for name, ratio in op.others if name == "compile"],
        )
        for op in shown
    ]
    title = "Ops, blocks and nets by themselves"
    caption = "Time of eager PyTorch (channels_last) over that of the others."
    if len(shown) < len(machine.ops):
        caption += f" The first {len(shown)} of {len(machine.ops)}; all are in the table."
    return Figure("ops", title, caption, charts.bars(title, bars, "eager = 1"))


def _op_bar(name: str, ratio: float, role: str) -> Bar:
    return Bar(name, ratio, role, f"{ratio:.2f}×")
