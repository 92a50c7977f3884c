"""The benchmark suite: what isn't right isn't timed, and what is reported is what was measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import compare
import pytest
import torch
from compare import COMPILE, EAGER, FUSED, NCHW, Case, Side
from torch import Tensor

from fusedres.plan import traffic

CHECKOUT = Path(compare.__file__).parents[1]
CPU = torch.device("cpu")
VALUES = 4 * 8 * 6 * 6


def side(factor: float, seconds: float = 0.0) -> Side:
    x = torch.ones(4, 8, 6, 6)

    def run() -> Tensor:
        time.sleep(seconds)
        return x * factor

    return Side(run, lambda: ({"out": run()}, {}))


def broken() -> Side:
    raise RuntimeError("no compiler")


def test_a_side_that_is_wrong_or_fails_is_not_timed(monkeypatch):
    limits = {"bandwidth": 1e9, "peak": 1e12, "source": "given"}
    monkeypatch.setattr(compare, "ceilings", lambda dtype: limits)
    sides = {
        FUSED: lambda: side(2.0),
        EAGER: lambda: side(2.0, 0.01),
        NCHW: lambda: side(2.01),
        COMPILE: broken,
    }
    sizes = traffic.activations(VALUES, "float32", "x", "z")
    work = [traffic.moved("bn_act", "none", sizes)]
    expected = {"out": torch.full((4, 8, 6, 6), 2.0, dtype=torch.float64)}, {}
    found = compare.figures(Case(sides, expected, (4, 8, 6, 6), torch.float32, work), 3, CPU)
    assert str(found[NCHW].failure).startswith("not timed, the check failed: the output out errs by 0.005")
    assert str(found[COMPILE].failure) == "no compiler"
    assert not found[NCHW].seconds and not found[COMPILE].seconds
    fused, eager = found[FUSED], found[EAGER]
    assert fused.facts and eager.facts and len(fused.seconds) == len(eager.seconds) == 3
    assert min(eager.seconds) >= 0.01
    median = statistics.median(fused.seconds)
    assert fused.facts["ratio_to_eager"] == pytest.approx(statistics.median(eager.seconds) / median)
    assert fused.facts["bytes"] == 2 * 4 * VALUES and fused.facts["flop"] == 0
    assert fused.facts["share_of_roofline"] == pytest.approx(8 * VALUES / 1e9 / median)
    assert fused.facts["peak_bytes"] >= 4 * VALUES
    assert fused.facts["minor_faults"] >= 0
    assert fused.facts["share_of_time_in_own_kernels"] == 0 and fused.facts["shape"] == [4, 8, 6, 6]
    assert "share_of_time_in_own_kernels" not in eager.facts


def test_pytest_benchmark_reports_what_was_measured(tmp_path):
    """One group, its sides by the command of the README; torch.compile is left to others."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-P", "-m", "pytest", "benchmarks/test_ops.py", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", "-k", "bias_relu_maxpool and bf16", "--benchmark-json", str(out)]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:]
    entries = json.loads(out.read_text())["benchmarks"]
    assert len({entry["group"] for entry in entries}) == 1
    by = {entry["extra_info"]["implementation"]: entry for entry in entries}
    assert tuple(by) == compare.SIDES
    eager = by[EAGER]["stats"]["median"]
    for name, entry in by.items():
        info, stats = entry["extra_info"], entry["stats"]
        assert stats["rounds"] == 5 and entry["params"]["side"] == name
        assert info["ratio_to_eager"] == pytest.approx(eager / stats["median"])
        assert info["share_of_roofline"] == pytest.approx(1e-3 * info["floor_ms"] / stats["median"])
        assert info["layout"] == ("nchw" if name == NCHW else "channels_last")
        assert info["bytes"] == 2 * 8 * 64 * 112 * 112 * 5 // 4 and info["dtype"] == "bf16"
        assert info["versions"]["torch"] == torch.__version__ and info["device"] and info["peak_bytes"] > 0
