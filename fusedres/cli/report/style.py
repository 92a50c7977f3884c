"""How a report looks: one accent for this package, greys for everybody else, in light and in dark."""

from __future__ import annotations

LIGHT = {
    "page": "#f6f7f7",
    "paper": "#ffffff",
    "ink": "#1c2227",
    "muted": "#5d676f",
    "line": "#dfe3e6",
    "fused": "#0d7a5c",
    "peer": "#aab3ba",
    "eager": "#ccd2d7",
    "warn": "#9a4a00",
}
DARK = {
    "page": "#111416",
    "paper": "#181c1f",
    "ink": "#e7ebee",
    "muted": "#98a3ab",
    "line": "#2c3338",
    "fused": "#3ac79b",
    "peer": "#66727b",
    "eager": "#444e55",
    "warn": "#e6a15c",
}


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


CSS = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1200px; margin: 0 auto; padding: 40px 20px 56px; }}
h1 {{ font-size: 26px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 8px; }}
h2 {{ font-size: 20px; line-height: 1.25; letter-spacing: -.005em; margin: 52px 0 2px; }}
h3 {{ font-size: 15px; margin: 0 0 2px; }}
p {{ margin: 0 0 8px; max-width: 76ch; }}
.lead {{ font-size: 17px; margin-bottom: 0; max-width: 62ch; }}
.facts, .note, figcaption, footer {{ color: var(--muted); font-size: 13px; }}
.facts {{ max-width: none; }}
b.fused {{ color: var(--fused); }}
.problems {{ border-left: 3px solid var(--warn); padding: 2px 0 2px 14px; margin: 22px 0 0;
  font-size: 13.5px; }}
.problems p {{ overflow-wrap: anywhere; margin: 0 0 4px; max-width: none; }}
.key {{ display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 18px 0 0; color: var(--muted);
  font-size: 13px; }}
.key span::before {{ content: ""; display: inline-block; width: 22px; height: 9px; margin-right: 7px;
  border-radius: 2px; background: var(--of); }}
.cards {{ columns: 3 340px; column-gap: 16px; margin: 16px 0; }}
figure {{ margin: 0 0 16px; padding: 16px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; break-inside: avoid; }}
.cards figure:last-child {{ margin-bottom: 0; }}
figcaption {{ margin-bottom: 12px; line-height: 1.4; max-width: 76ch; }}
.narrow {{ display: none; }}
@media (max-width: 740px) {{ .narrow {{ display: block; }} .wide {{ display: none; }} }}
svg {{ display: block; width: 100%; height: auto; max-width: 420px; font-family: inherit; }}
.wide svg {{ max-width: none; }}
svg text {{ fill: var(--ink); font-variant-numeric: tabular-nums; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }}
svg text.muted {{ fill: var(--muted); }}
svg text.strong {{ font-weight: 600; }}
svg text.fused {{ fill: var(--fused); font-weight: 600; }}
rect.fused, circle.fused {{ fill: var(--fused); }}
rect.peer, circle.peer {{ fill: var(--peer); }}
rect.eager, circle.eager {{ fill: var(--eager); }}
rect.paper {{ fill: var(--paper); }}
rect.roof {{ fill: none; stroke: var(--muted); stroke-dasharray: 3 2.5; }}
line, polyline {{ fill: none; stroke: var(--line); }}
line.unit {{ stroke: var(--muted); stroke-dasharray: 2 3; }}
line.floor {{ stroke: var(--ink); stroke-width: 2; }}
polyline.roof {{ stroke: var(--muted); stroke-width: 1.5; }}
polyline.fused, polyline.peer, polyline.eager {{ stroke-width: 2; }}
polyline.fused {{ stroke: var(--fused); }}
polyline.peer {{ stroke: var(--peer); }}
polyline.eager {{ stroke: var(--eager); }}
.scroll {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--paper); }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 12px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }}
thead th {{ border-top: 0; color: var(--muted); font-weight: 500; }}
th:first-child, td:first-child, .left {{ text-align: left; }}
tbody th {{ font-weight: 600; padding-top: 10px; }}
tr.fused td {{ color: var(--fused); font-weight: 600; }}
details {{ margin: 0 0 10px; }}
summary {{ cursor: pointer; color: var(--muted); font-size: 13.5px; padding: 4px 0; }}
h2 + .scroll {{ margin-top: 14px; }}
footer {{ margin-top: 40px; border-top: 1px solid var(--line); padding-top: 14px; }}
code {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .92em; }}
"""
