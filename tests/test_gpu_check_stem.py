"""benchmarks/gpu_check_stem.py: its cases and floors, a wrong kernel, a missing one."""

from __future__ import annotations

import time

import gpu_check_convs
import gpu_check_stem
import pytest
import torch
from gpu_check_run import Check, Results

from fusedres import plan
from fusedres.kernels import reference

STEM_OPS = (*plan.STEM_OPS, *plan.STEM_BIAS_OPS)


def run(folder):
    gpu_check_stem.stem(Check("stem", "cpu", True, folder, time.monotonic() + 60))
    return [record for record in Results(folder).latest() if record["name"] in STEM_OPS]


def test_every_op_in_every_dtype(tmp_path):
    records = run(tmp_path)
    assert [record["name"] for record in records] == 3 * list(STEM_OPS)
    assert all(record["ok"] and record["ms"] > 0 for record in records)
    lines = gpu_check_stem.show_stem(records)
    assert len(lines) == 9 and all("of the floor" in line for line in lines)


def test_bytes_and_flop():
    conv, wgrad, trained = gpu_check_stem.calls(2, 224, "cpu", torch.bfloat16)
    image, y = 2 * 3 * 224 * 224, 2 * 64 * 112 * 112
    packed, weight = 2 * 229 * 230 * 4, 64 * 147
    assert conv.bytes == 2 * (image + packed + y + weight)
    assert wgrad.bytes == 2 * (y + packed + weight)
    assert trained.bytes == 2 * (image + y // 4 + weight)
    assert {call.flop for call in (conv, wgrad, trained)} == {2 * y * 147}


@pytest.mark.parametrize("op", STEM_OPS)
def test_a_wrong_kernel_is_recorded(op, tmp_path, monkeypatch):
    right = getattr(reference, op)
    calls = []

    def wrong(*arguments):
        right(*arguments)
        calls.append(arguments)
        if len(calls) > spared:
            arguments[first][0, 2, 1, 1] += 1.0

    # the inputs' and the expected result's calls are the oracle's
    spared = 2 if op == "stem_conv" else 1
    first = -2 if op == "stem_conv" else -1  # output, whose statistics follow
    monkeypatch.setattr(reference, op, wrong)
    monkeypatch.setattr(gpu_check_stem, "_DTYPES", (torch.bfloat16,))
    records = {record["name"]: record for record in run(tmp_path)}
    assert {name: record["ok"] for name, record in records.items()} == {name: name != op for name in STEM_OPS}
    assert "ms" not in records[op]


def test_without_the_kernels_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check_convs.IMPLEMENTATIONS, "cpu", ("cuda",))
    monkeypatch.setattr(gpu_check_convs.kernels, "unavailable", lambda: {"cuda": "not there"})
    assert run(tmp_path) == []
    lines = gpu_check_stem.show_stem(Results(tmp_path).latest())
    assert set(lines) == {"cuda: not measured, not there"}
