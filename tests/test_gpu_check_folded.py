"""benchmarks/gpu_check_folded.py: its cases are the net's, cuDNN's way gives the same, wrong kernels show."""

from __future__ import annotations

import time

import gpu_check_convs
import gpu_check_folded
import pytest
import torch
from gpu_check_folded import Folded, call_of, cases
from gpu_check_run import Check, Results
from tolerances import assert_close_to_reference

import fusedres
from fusedres import ops, plan
from fusedres.kernels import reference

CONV = plan.Conv(1, 16, 8, 7, 24, 3, 2)
KINDS = [
    Folded(CONV),
    Folded(CONV._replace(side=1, residual=True)),
    Folded(CONV._replace(side=1), relu=False),
    Folded(plan.Conv(1, 64, 8, 7, 16, 3, 1, residual=True), block=True),
]
OPS = ("conv_bias_act", "bottleneck_infer")


def run(folder, seconds=60.0):
    gpu_check_folded.folded(Check("folded", "cpu", True, folder, time.monotonic() + seconds))
    return Results(folder).latest()


def test_cases_are_what_an_optimised_net_binds():
    found = cases(64)
    net = fusedres.optimize_for_inference(fusedres.resnet50().eval())
    table = [step for step in fusedres.explain(net, (1, 3, 64, 64)) if step.op.startswith("conv + bias")]
    convs = {case: count for case, count in found.items() if not case.block}
    # all but the stem
    assert sum(convs.values()) == len(table) - 1 == 52
    relus = sum("ReLU" in step.op for step in table) - 1
    assert sum(count for case, count in convs.items() if case.relu) == relus == 48
    assert sum(count for case, count in convs.items() if case.conv.residual) == 16


def test_blocks_are_those_of_the_kernel():
    blocks = {str(case): count for case, count in cases(224).items() if case.block}
    assert blocks == {"block 256x56x56, 64 inside": 2, "block 512x28x28, 128 inside": 3}
    for case in cases(224):
        if case.block:
            problem = plan.Problem("bottleneck_infer", "cuda", "bfloat16", (9, 0), conv=case.conv)
            assert plan.refusal("cuda", problem, {}) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pytorchs_way_gives_the_same(kind):
    call = call_of(kind, 2, "cpu", torch.float32)
    with fusedres.backend("reference"):
        (ours,) = call.run()
        expected = call.expected()
    (theirs,) = call.composed()
    assert_close_to_reference(ours, theirs, expected)
    assert call.plain().shape == ours.shape


def test_bytes_and_flop():
    conv, block = call_of(KINDS[1], 2, "cpu", torch.bfloat16), call_of(KINDS[3], 2, "cpu", torch.bfloat16)
    outputs = 2 * 24 * 4 * 4
    # every second pixel of every second row, the weight, the residual and the output
    assert conv.bytes == 2 * (2 * 16 * 4 * 4 + 16 * 24 + 2 * outputs) and conv.flop == 2 * outputs * 16
    weights = 2 * 64 * 16 + 9 * 16 * 16
    assert block.bytes == 2 * (2 * 2 * 64 * 8 * 7 + weights) and block.flop == 2 * 2 * 8 * 7 * weights


def test_all_are_measured(tmp_path):
    records = [record for record in run(tmp_path) if record["name"] in OPS]
    assert all(record["ok"] and record["ms"] > 0 for record in records)
    found = cases(32)
    in_bf16 = [record for record in records if record["dtype"] == "bfloat16"]
    assert len(in_bf16) == len(found) and sum(r["count"] for r in in_bf16) == sum(found.values())
    assert {record["dtype"] for record in records} == {"bfloat16", "float16", "float32"}
    lines = gpu_check_convs.show_convs(records)
    assert sum("reference" in line and "of the floor" in line for line in lines) >= 4


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_kernel_is_recorded(op, tmp_path, monkeypatch):
    right = getattr(reference, op)

    def wrong(*arguments):
        right(*arguments)
        if ops.forced_backend() == "auto":  # and not the reference that it is held against
            arguments[-1][0, 2, 1, 1] += 1.0

    monkeypatch.setattr(reference, op, wrong)
    monkeypatch.setitem(gpu_check_convs.IMPLEMENTATIONS, "cpu", ("auto",))
    monkeypatch.setattr(gpu_check_folded, "_plan", lambda _: [(kind, torch.bfloat16) for kind in KINDS])
    monkeypatch.setattr(gpu_check_folded, "cases", lambda _: dict.fromkeys(KINDS, 1))
    records = [record for record in run(tmp_path) if record["name"] in OPS]
    # the reference's block is of the reference's convolutions
    told = OPS if op == "conv_bias_act" else (op,)
    assert [record["ok"] for record in records] == [record["name"] not in told for record in records]
    assert len(records) == len(KINDS)


def test_out_of_time(tmp_path):
    records = run(tmp_path, seconds=-1)
    assert records[-1]["name"] == "out of time"
    assert "not measured" in gpu_check_convs.show_convs(records)[-1]
