"""The last part: what was measured as a page and as PNGs, beside the results."""

from __future__ import annotations

import importlib.util

from gpu_check_run import Check, Record

from fusedres.cli import report
from fusedres.cli.report import load


def figures(check: Check) -> None:
    """report.html, and with matplotlib a PNG of each figure."""
    results = load.load([check.folder / "results.jsonl"])
    if not results.machines:
        check.record("nothing to draw", reason="no part has measured anything")
        return
    drawn = report.drawings(results)
    report.write_page(results, drawn, check.folder / "report.html", "fusedres, checked on a GPU")
    check.record("page", file="report.html", figures=sum(map(len, drawn.values())))
    if importlib.util.find_spec("matplotlib") is None:
        check.record("no PNGs", reason="matplotlib isn't installed")
        return
    report.write_pngs(drawn, check.folder)
    check.record("PNGs", files=sorted(path.name for path in check.folder.glob("*.png")))


def show_figures(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if "reason" in record:
            lines.append(f"{record['name']}: {record['reason']}")
        elif record["name"] == "page":
            lines.append(f"{record['file']}: {record['figures']} figures")
        else:
            lines.append(f"{len(record['files'])} PNGs")
    return lines
