"""Figures as a few kinds of marks at places in pixels: written as SVG for a page, or as a PNG.

A mark's colour is its role's, which a page sets for light and dark (``style.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fusedres.cli.report.style import LIGHT
from fusedres.training import files

FONT, SMALL = 12, 11  # pixels
_WIDE = 7.1  # of a character of FONT, on the average, in a wide typeface
_DPI = 192
_MARGIN, _HEAD = 16.0, 64.0  # of a PNG
_CSS_DPI = 96


def text_width(text: str, size: int = FONT) -> float:
    return _WIDE * len(text) * size / FONT


@dataclass(frozen=True)
class Mark:
    """One thing that is drawn: "rect", "line", "circle", "path" or "text", with what it stands for."""

    kind: str
    role: str
    at: tuple[float, ...]
    text: str = ""
    anchor: str = "start"
    size: int = FONT
    data: tuple[tuple[str, str], ...] = ()


@dataclass
class Drawing:
    """Marks on an area of ``width`` by ``height`` pixels; ``title`` is what it says to who can't see it."""

    title: str
    width: float
    height: float = 0
    marks: list[Mark] = field(default_factory=list)

    def rect(self, role: str, x: float, y: float, w: float, h: float, tip: str = "", **data: object) -> None:
        self.marks.append(Mark("rect", role, (x, y, max(w, 0.5), h), tip, data=_attributes(data)))

    def line(self, role: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.marks.append(Mark("line", role, (x1, y1, x2, y2)))

    def circle(self, role: str, x: float, y: float, r: float, tip: str = "", **data: object) -> None:
        self.marks.append(Mark("circle", role, (x, y, r), tip, data=_attributes(data)))

    def path(self, role: str, *points: tuple[float, float]) -> None:
        self.marks.append(Mark("path", role, tuple(value for point in points for value in point)))

    def text(self, role: str, x: float, y: float, text: str, anchor: str = "start", size: int = FONT) -> None:
        self.marks.append(Mark("text", role, (x, y), text, anchor, size))

    def svg(self) -> str:
        box = f"0 0 {_number(self.width)} {_number(self.height)}"
        inside = "\n".join(_svg(mark) for mark in self.marks)
        return f'<svg viewBox="{box}" role="img" aria-label="{escape(self.title)}">\n{inside}\n</svg>'

    def png(self, path: Path, where: str) -> None:
        """Draw it in the light colours, under its title and ``where`` it was measured (needs matplotlib)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width, height = self.width + 2 * _MARGIN, self.height + _HEAD + _MARGIN
        size = (width / _CSS_DPI, height / _CSS_DPI)
        figure = Figure(figsize=size, dpi=_DPI, facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        axes: Any = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-_MARGIN, self.width + _MARGIN), ylim=(self.height + _MARGIN, -_HEAD))
        axes.axis("off")
        heading = Mark("text", "strong", (0, -38), self.title, size=15)
        for mark in (heading, Mark("text", "muted", (0, -20), where), *self.marks):
            _paint(axes, mark)
        with files.atomic(path) as temporary:
            figure.savefig(temporary, format="png")


def _attributes(data: dict[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in data.items())


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _svg(mark: Mark) -> str:
    at = [_number(value) for value in mark.at]
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in mark.data)
    role = f'class="{mark.role}"{data}'
    tip = f"<title>{escape(mark.text)}</title>" if mark.text else ""
    if mark.kind == "rect":
        x, y, w, h = at
        return f'<rect {role} x="{x}" y="{y}" width="{w}" height="{h}" rx="1.5">{tip}</rect>'
    if mark.kind == "line":
        return '<line {} x1="{}" y1="{}" x2="{}" y2="{}"/>'.format(role, *at)
    if mark.kind == "circle":
        return f'<circle {role} cx="{at[0]}" cy="{at[1]}" r="{at[2]}">{tip}</circle>'
    if mark.kind == "path":
        points = " ".join(f"{x},{y}" for x, y in zip(at[::2], at[1::2], strict=True))
        return f'<polyline {role} points="{points}"/>'
    place = f'x="{at[0]}" y="{at[1]}" text-anchor="{mark.anchor}" font-size="{mark.size}"'
    return f"<text {role} {place}>{escape(mark.text)}</text>"


def _paint(axes: Any, mark: Mark) -> None:
    from matplotlib.patches import Circle, Rectangle

    colour = LIGHT[_colour(mark.role)]
    hollow = mark.role == "roof"
    look: dict[str, Any] = {
        "facecolor": "none" if hollow else colour,
        "edgecolor": colour if hollow else "none",
        "linestyle": "--" if hollow else "-",
    }
    if mark.kind == "rect":
        x, y, w, h = mark.at
        axes.add_patch(Rectangle((x, y), w, h, **look))
    elif mark.kind == "circle":
        axes.add_patch(Circle((mark.at[0], mark.at[1]), mark.at[2], **look))
    elif mark.kind in ("line", "path"):
        dashed = "--" if mark.role in ("unit", "roof") else "-"
        axes.plot(mark.at[::2], mark.at[1::2], color=colour, linewidth=0.8, linestyle=dashed)
    else:
        align = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        points = mark.size * 72 / _CSS_DPI
        weight = "bold" if mark.role == "strong" else "normal"
        axes.text(*mark.at, mark.text, color=colour, fontsize=points, ha=align, va="baseline", weight=weight)


def _colour(role: str) -> str:
    """Of a role, the palette's."""
    return {"strong": "ink", "unit": "muted", "roof": "muted", "floor": "ink", "grid": "line"}.get(role, role)
