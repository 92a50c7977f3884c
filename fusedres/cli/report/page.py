"""The page: one file that asks nothing of the network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from fusedres import __version__
from fusedres.cli.report.data import EAGER, FUSED, Machine, Results, Side
from fusedres.cli.report.figures import MODES, Figure, sorted_comparisons, title_of
from fusedres.cli.report.style import CSS

_MIB = 2**20
_KEY = {
    "fused": "var(--fused)",
    "eager PyTorch": "var(--eager)",
    "others": "var(--peer)",
}


def render(results: Results, figures: dict[str, list[Figure]], title: str) -> str:
    """The whole document.

    Args:
        results: what was read.
        figures: of each machine, by its name.
        title: of the page.
    """
    machines = sorted(results.machines.values(), key=lambda machine: machine.by_others)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(machines)}</p>',
        _problems(results.problems),
        _key(),
        *(part for machine in machines for part in _machine(machine, figures[machine.name])),
        _sources(results),
        f"<footer>Made by fusedres {escape(__version__)} of the files above. A bar or a dot has its value "
        "in its title.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _lead(machines: Sequence[Machine]) -> str:
    """What stands at the top: the span of the ratios on each machine."""
    said = []
    for machine in machines:
        if machine.tiny:
            continue
        spans = []
        for mode, name in MODES.items():
            ratios = [
                side.ratio
                for each in machine.comparisons
                if each.mode == mode and not each.sweep
                for side in each.sides
                if side.name == FUSED and side.ratio is not None
            ]
            if ratios:
                span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
                spans.append(f'{name.lower()} <b class="fused">{span} times</b> as fast as eager PyTorch')
        if spans:
            said.append(f"On {escape(machine.name)}: {', '.join(spans)}.")
    return " ".join(said)


def _problems(problems: Iterable[str]) -> str:
    lines = [f"<p>{escape(problem)}</p>" for problem in problems]
    return f'<div class="problems"><h3>Not shown</h3>{"".join(lines)}</div>' if lines else ""


def _key() -> str:
    spans = "".join(f'<span style="--of: {colour}">{name}</span>' for name, colour in _KEY.items())
    return f'<div class="key">{spans}</div>'


def _machine(machine: Machine, figures: Sequence[Figure]) -> Iterable[str]:
    yield f"<h2>{escape(machine.name)}</h2>"
    yield f'<p class="facts">{escape(" · ".join(machine.facts))}</p>'
    if machine.by_others:
        ours = any(side.role == FUSED for each in machine.comparisons for side in each.sides)
        said = (
            "The figures of other frameworks are baselines."
            if ours
            else ("No figure of fusedres: other frameworks, the baseline for a run on this machine.")
        )
        yield f'<p class="note">{said}</p>'
    yield from (f'<p class="note">{escape(note)}</p>' for note in machine.notes)
    where = slug(machine.name)
    narrow = [_figure(figure, where) for figure in figures if figure.wide is None]
    yield f'<div class="cards">{"".join(narrow)}</div>'
    yield from (_figure(figure, where) for figure in figures if figure.wide is not None)
    yield from _tables(machine)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _figure(figure: Figure, where: str) -> str:
    svg, kind = figure.drawing.svg(), ""
    if figure.wide is not None:
        kind = ' class="full"'
        svg = f'<div class="narrow">{svg}</div><div class="wide">{figure.wide.svg()}</div>'
    return (
        f'<figure id="{where}-{escape(figure.name)}"{kind}><h3>{escape(figure.title)}</h3>'
        f"<figcaption>{escape(figure.caption)}</figcaption>{svg}</figure>\n"
    )


def _tables(machine: Machine) -> Iterable[str]:
    head = ("", "img/s", "ratio", "ms", "least to most", "peak MiB", "start-up s", "what ran")
    for mode, name in MODES.items():
        rows = []
        for each in sorted_comparisons(machine, mode):
            rows.append(f'<tr><th colspan="{len(head)}">{escape(title_of(each, machine))}</th></tr>')
            rows += [_side(side) for side in each.sides]
        if rows:
            yield _folded(f"{name}, all figures", head, rows)
    if machine.quantised:
        rows = [
            f"<tr><td>{escape(each.net)}, batch {each.batch}</td><td>{each.before:,.1f}</td>"
            f"<td>{each.after:,.1f}</td><td>{each.after / each.before:.2f}×</td>"
            f"<td>{each.bytes_before / _MIB:.2f}</td><td>{each.bytes_after / _MIB:.2f}</td>"
            f"<td>{'' if each.agree is None else '{} of {}'.format(*each.agree)}</td></tr>"
            for each in machine.quantised
        ]
        names = ("", "img/s before", "8 bits", "ratio", "weights, MiB", "8 bits, MiB", "answers as before")
        yield _folded("8 bits, all figures", names, rows)
    if machine.layers:
        rows = [
            f"<tr><td>{escape(layer.label)}, {escape(layer.direction)}</td><td>{layer.dtype}</td>"
            f"<td>{layer.count}</td><td>{'fusedres' if role == FUSED else 'PyTorch'}</td><td>{ms:.4f}</td>"
            f"<td>{layer.floor_ms:.4f}</td><td>{layer.floor_ms / ms:.0%}</td>"
            f"<td>{layer.bytes / 1e6:,.1f}</td><td>{layer.flop / 1e9:,.1f}</td></tr>"
            for layer in machine.layers
            for role, ms in layer.ms.items()
        ]
        of_layers = ("", "dtype", "count", "by", "ms", "floor, ms", "share", "MB", "GFLOP")
        yield _folded("Layers, all figures", of_layers, rows)
    if machine.ops:
        rows = [
            f"<tr><td>{escape(op.label)}</td><td>{op.ratio:.2f}×</td>"
            f"<td>{', '.join(f'{escape(name)} {ratio:.2f}×' for name, ratio in op.others)}</td>"
            f"<td>{'' if op.gbps is None else f'{op.gbps:,.1f}'}</td>"
            f"<td>{'' if op.share is None else f'{op.share:.0%}'}</td></tr>"
            for op in machine.ops
        ]
        yield _folded("Ops, all figures", ("", "fused", "others", "GB/s", "of the roofline"), rows)


def _side(side: Side) -> str:
    median, least, most = side.ms
    cells = (
        f"{side.images_per_second:,.1f}",
        "" if side.ratio is None else f"{side.ratio:.2f}×",
        f"{median:,.2f}",
        "" if least is None else f"{least:,.2f} to {most:,.2f}",
        "" if side.peak_bytes is None else f"{side.peak_bytes / _MIB:,.0f}",
        "" if side.startup_s is None else f"{side.startup_s:.1f}",
        escape(side.description),
    )
    kind = f' class="{side.role}"' if side.role in (FUSED, EAGER) else ""
    values = "".join(f"<td>{cell}</td>" for cell in cells[:-1])
    return f'<tr{kind}><td>{escape(side.name)}</td>{values}<td class="left">{cells[-1]}</td></tr>'


def _folded(summary: str, head: Sequence[str], rows: Sequence[str]) -> str:
    return f"<details><summary>{escape(summary)}</summary>{_table(head, rows)}</details>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _sources(results: Results) -> str:
    rows = [
        f'<tr><td>{escape(source.path.name)}</td><td class="left">{escape(source.kind)}</td>'
        f'<td>{escape(source.date)}</td><td class="left"><code>{escape(source.command)}</code></td></tr>'
        for source in results.sources
    ]
    return f"<h2>Files</h2>{_table(('file', 'what', 'date', 'command'), rows)}"
