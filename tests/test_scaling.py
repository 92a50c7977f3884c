"""benchmarks/scaling.py: its points, what it writes of each, and where it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scaling
import torch

from fusedres.cli.report import load

CPU = torch.device("cpu")
COMMON = {"dtype": "fp32", "mode": "inference", "rounds": 1, "warmup": 1}


def test_the_points():
    found = scaling.sweeps("resnet50", 16)
    assert [point["batch"] for point in found["batch"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    depths = {
        name: [int(p["model"].removeprefix("resnet")) for p in found[name]] for name in ("depth", "cifar")
    }
    assert depths == {"depth": [18, 34, 50, 101, 152], "cifar": [20, 32, 44, 56, 110, 1202]}
    assert all(len({*map(str, points)}) == len(points) for points in found.values())
    for points in found.values():
        sizes = [scaling._size(point) * point.get("threads", 1) for point in points]
        assert sizes == sorted(sizes)


def test_a_point_is_a_run_of_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "scaling.jsonl"
    points = [{"model": "resnet8", "batch": 2}]
    arguments = ["--mode", "inference", "--dtype", "fp32", "--rounds", "1", "--out", str(out)]
    assert scaling.main(arguments, lambda model, batch: {"cifar": points}) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["load_before"] >= 0 < row["cores"]
    assert row["sweep"] == "cifar" and row["settings"]["model"] == "resnet8"
    assert row["command"].startswith("fusedres bench --model=resnet8 --batch=2 ")
    (machine,) = load.load([out]).machines.values()
    assert [each.sweep for each in machine.comparisons] == ["cifar"]


FAILS = """#!/bin/sh
case "$*" in *resnet9*) echo "usage" >&2; echo "error: invalid choice: 'resnet9'" >&2; exit 2;; esac
kill -9 $$
"""


@pytest.mark.parametrize(
    ("model", "said"), [("resnet9", "error: invalid choice: 'resnet9'"), ("resnet50", "killed by signal 9")]
)
def test_a_point_that_fails_ends_its_sweep(model, said, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(FAILS)
    program.chmod(0o755)
    monkeypatch.setattr(scaling.sys, "executable", str(program))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "scaling.jsonl"
    points = [{"model": model, "batch": batch} for batch in (2, 4)]
    assert scaling.main(["--out", str(out)], lambda model, batch: {"batch": points}) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["sweep"], row["left_out"], row["point"]["batch"]) == ("batch", said, 2)


def fake(monkeypatch: pytest.MonkeyPatch, peak: int, free: int | None) -> list[dict[str, Any]]:
    ran: list[dict[str, Any]] = []

    def bench(point: dict[str, Any], limit: float) -> Any:
        ran.append(point)
        return {"results": [{"implementations": {"eager": {"peak_bytes": peak * point["batch"]}}}]}, None

    monkeypatch.setattr(scaling, "_bench", bench)
    monkeypatch.setattr(scaling, "_free", lambda device: free)
    return ran


@pytest.mark.parametrize(("free", "count"), [(None, 9), (4 * 64 << 30, 7), (4 * 64 - 1 << 30, 6)])
def test_what_would_not_fit_is_left_out(free, count, monkeypatch):
    ran = fake(monkeypatch, 1 << 30, free)
    points = scaling.sweeps("resnet50", 16)["batch"]
    rows = list(scaling.swept("batch", points, COMMON, 60, CPU))
    assert [point["batch"] for point in ran] == [2**power for power in range(count)]
    assert [row for row in rows if "left_out" in row] == rows[count:] and len(rows) == min(count + 1, 9)
    if free is not None:
        expected = f"it would take about {4 * 2**count} GiB, and {free >> 30} are free"
        assert rows[-1]["left_out"] == expected and rows[-1]["point"]["batch"] == 2**count


def test_a_point_has_a_limit():
    assert scaling._bench({"model": "resnet152"} | COMMON, 0.2) == (None, "it took more than 0 s")


def test_memory_that_is_free():
    free = scaling._free(CPU)
    assert free is None or 1 << 20 < free < 1 << 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--sweeps", "batch,width"], "no sweep 'width'"), (["--out", "no/such/place"], "can't write no/such")],
)
def test_errors(arguments, said, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        scaling.main(["--out", str(tmp_path / "out.jsonl"), *arguments])
    assert stop.value.code == 2 and said in capsys.readouterr().err
