"""benchmarks/tables.py: what the pages say was measured is what the committed files say."""

from __future__ import annotations

import json
import re

import tables
from tables import PEERS, RESULTS

from fusedres.cli.roofline import LEVELS, passes
from fusedres.plan.conv import BANDWIDTH, PEAK


def test_pages_have_the_figures_of_the_files():
    """``python benchmarks/tables.py`` would change nothing."""
    texts = [page.read_text() for page in tables.PAGES]
    marked = re.findall(r"<!-- measured: (\S+) -->", "".join(texts))
    assert sorted(marked) == sorted(tables.MEASURED)
    for text in texts:
        assert tables.written(text) == text


def test_another_result_is_another_text(monkeypatch):
    sides = {"compile": {"ms": {"median": 1.25}}, "fused": {"ms": {"median": 0.75}}}
    monkeypatch.setattr(tables, "_result", lambda name: {"implementations": sides})
    page = "before\n<!-- measured: compiling -->\n716.0 ms\n<!-- end of measured -->\nbehind\n"
    found = tables.written(page)
    said = " ".join(found.split())
    assert "in 1.2 ms by" in said and "in 0.8 ms fused" in said and "716" not in said
    assert found.startswith("before\n<!-- measured") and found.endswith("measured -->\nbehind\n")


def test_readme_has_the_figures_of_the_peers():
    """The baseline on the H100, and the roofs beside it."""
    readme = (RESULTS.parents[1] / "README.md").read_text()
    table = readme[readme.index("| training | img/s |") : readme.index("A roof counts")]
    lines = [json.loads(line) for path in PEERS.glob("peers_*") for line in path.read_text().splitlines()]
    speeds = {(line["kind"], line["variant"]): line["img_s"] for line in lines if "img_s" in line}
    measured = [
        *(speeds["train", name] for name in ("eager_amp_cl", "compile_amp_cl", "jax_bf16_nhwc")),
        *(speeds["infer", name] for name in ("eager_cl", "compile_freeze_cl", "jax_bf16_nhwc")),
    ]
    levels = {name: passes(name, "resnet50", 256, 224, "bfloat16") for name in LEVELS}
    bound = (BANDWIDTH, PEAK["bfloat16"])
    roofs = [
        round(256 / sum(placed.work.seconds(*bound) for placed in levels[name]), -2)
        for name in ("block", "joint", "conv", "block-inference")
    ]
    written = sorted(int(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+) (?=\|)", table))
    assert written == sorted(round(value) for value in (*measured, *roofs))
    moved = {name: sum(placed.work.bytes for placed in found) / 256 / 1e6 for name, found in levels.items()}
    said = re.search(r"(\d+) MB an image.*?moves (\d+) and a compiler (\d+)", readme, re.DOTALL)
    assert said and [int(value) for value in said.groups()] == [
        round(moved[name]) for name in ("block", "eager", "compile")
    ]
