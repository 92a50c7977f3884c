"""benchmarks/gpu_check.py: its logic on a CPU, what a part that fails leaves, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_cases
import gpu_check_net
import gpu_check_ops
import pytest
import torch
from gpu_check_run import Part, Results, run_parts

from fusedres.cli.report import load
from fusedres.plan import traffic

BENCHMARKS = Path(gpu_check.__file__).parent
FIRST_INT8 = ("first call", "int8")
pytestmark = pytest.mark.xdist_group("gpu_check")  # one process, for one run of everything


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """The folder, the records and the output of a run of everything on small shapes."""
    folder = tmp_path_factory.mktemp("check") / "new" / "folder"
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--tiny", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "results.jsonl").read_text().splitlines()
    return folder, [json.loads(line) for line in lines], done.stdout


def test_every_part_runs_and_every_gate_holds(tiny):
    folder, records, output = tiny
    header, *rest = records
    assert header["part"] == "header" and header["device"] == "cpu" and header["tiny"]
    assert header["versions"]["torch"] == torch.__version__ and header["machine"]["device_name"]
    assert header["parts"] == list(gpu_check.PARTS)
    ends = [record for record in rest if record["name"] == "end"]
    assert [record["part"] for record in ends] == list(gpu_check.PARTS)
    assert all(record["ok"] for record in rest), [record for record in rest if not record["ok"]]
    for part in gpu_check.PARTS:
        assert len([record for record in rest if record["part"] == part]) > 1
    summary = (folder / "summary.txt").read_text()
    assert summary in output
    assert all(f"{part}: done in" in summary for part in gpu_check.PARTS)
    assert "WRONG" not in summary


def test_a_report_shows_it(tiny):
    folder, records, _ = tiny
    results = load.load([folder])
    assert not results.problems
    (machine,) = results.machines.values()
    assert {each.mode for each in machine.comparisons} == {"train", "inference"}
    timed = [record for record in records if "floor_ms" in record and "ms" in record]
    assert [layer.ms["fused"] for layer in machine.layers] == [record["ms"] for record in timed]
    assert machine.ops and machine.notes


def test_figures_lie_beside_the_results(tiny):
    folder, records, _ = tiny
    (page,) = [record for record in records if record["name"] == "page"]
    html = (folder / "report.html").read_text()
    assert html.count("<figure") == page["figures"] > 3
    pngs = [record["files"] for record in records if record["name"] == "PNGs"]
    assert [sorted(path.name for path in folder.glob("*.png"))] == (pngs or [[]])
    if pngs:
        assert len(pngs[0]) == page["figures"]


def test_what_is_measured(tiny):
    _, records, _ = tiny
    by = {part: [r for r in records if r["part"] == part] for part in gpu_check.PARTS}
    assert by["correct"][0]["passed"] > 10 and by["correct"][0]["failures"] == []
    assert by["copy"][0]["gbps"] > 0
    timed = [record for record in by["ops"] if "ms" in record]
    assert {record["name"] for record in timed} == {
        *(op for op in traffic.OPS if not op.startswith(("conv_", "stem_", "bottleneck_"))),
        *gpu_check_cases.PASSES,
    }
    for record in timed:
        assert record["gbps"] == pytest.approx(1e-6 * record["bytes"] / record["ms"])
        assert record["meets_target"] == (record["share_of_copy"] >= gpu_check_ops.TARGET)
    variants = {record["variant"] for record in timed if record["name"] == "bn_act_backward_apply"}
    assert variants == {"none", "plain", "normalised"}
    assert {record["dtype"] for record in timed} == {"bfloat16", "float16", "float32"}
    assert {record["implementation"] for record in timed} >= {"aten", "reference"}
    sides = {
        part: {r["implementation"] for r in by[part] if "peak_bytes" in r} for part in ("train", "compile")
    }
    assert sides == {"train": {"reference", "auto", "eager"}, "compile": {"auto", "eager", "compile"}}
    inference = {r["implementation"] for r in by["inference"] if r["name"] == "inference"}
    assert inference == {"eager", "auto", "int8"}  # and "triton" on a GPU
    errors = [
        r["relative_error"] for r in by["inference"] if (r["name"], r.get("implementation")) == FIRST_INT8
    ]
    assert len(errors) == 2 and all(0 < error < 0.1 for error in errors)
    shares = {
        r["implementation"]: r["fused_convolution_share"] for r in by["train"] if r["name"] == "breakdown"
    }
    assert shares.keys() == sides["train"] and shares["eager"] == 0 < shares["reference"] <= 1
    frozen = {r["implementation"] for r in by["frozen"] if r["name"] == "inference"}
    assert frozen == {"auto", "eager", "compile"}
    assert not [record for record in by["compile"] if record["name"] == "breakdown"]
    folded = {record["name"] for record in by["folded"] if "ms" in record}
    assert folded == {"conv_bias_act", "bottleneck_infer"}
    first = [record for record in by["train"] if record["name"] == "first step"]
    for record in first:
        assert record["loss"] == pytest.approx(record["reference_loss"], rel=1e-3)
        assert record["gradient_norm"] == pytest.approx(record["reference_gradient_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # x and the residual are read for the statistics, and again for z, which is written: five tensors
        (("bn_forward", (2, 64, 8, 8), torch.bfloat16, "normalised"), 5 * 2 * 64 * 64 * 2),
        (("bn_act_backward_reduce", (2, 64, 8, 8), torch.float32, "plain"), 4 * 2 * 64 * 64 * 4),
        # x read; a quarter as many outputs and their bytes of the index written
        (("bn_relu_maxpool", (256, 64, 112, 112), torch.bfloat16), 411_041_792 + 51_380_224 * 3),
        (("bias_relu_maxpool", (256, 64, 112, 112), torch.bfloat16), 411_041_792 + 51_380_224 * 2),
        (("global_avg_pool", (2, 16, 7, 7), torch.float16), (2 * 16 * 49 + 2 * 16) * 2),
        (("cast_weights", (1000,), torch.bfloat16), 6000),
    ],
)
def test_bytes_of_the_contract(arguments, expected):
    assert gpu_check_cases.bytes_moved(*arguments) == expected


def _values(t: list[torch.Tensor]) -> None:
    t[0][1, 1, 1, 1] += 1e-3


def _unwritten(t: list[torch.Tensor]) -> None:
    t[0] = torch.empty_like(t[0])


def _sums(t: list[torch.Tensor]) -> None:
    t[1][1, 3] += 1e-3


def _places(t: list[torch.Tensor]) -> None:
    t[2][0, 0, 0, 0] = 1


@pytest.mark.parametrize(
    ("spoil", "output"),
    [(_values, 0), (_unwritten, 0), (_sums, 1), (_places, 2)],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_the_gate_sees_a_wrong_result(spoil, output):
    reference = [torch.ones(4, 8, 6, 6), torch.ones(4, 8), torch.zeros(4, 8, 3, 3, dtype=torch.uint8)]

    def run():
        results = [t.clone() for t in reference]
        spoil(results)
        return results

    assert gpu_check_ops.gate(lambda: reference, reference) == (None, 0.0)
    wrong, _ = gpu_check_ops.gate(run, reference)
    assert wrong is not None and wrong.startswith(f"output {output}: ")


PART = """
import os, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu_check_run import Check, Part, run_here

def fine(check):
    check.record("value", number=1)

def raises(check):
    check.record("before")
    raise ValueError("no such thing\\nand more")

def crashes(check):
    check.record("before")
    os.abort()

def hangs(check):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    check.record("before", child=child.pid)
    time.sleep(300)

from pathlib import Path
name = sys.argv[1]
part = Part(globals().get(name, fine), 1)
sys.exit(run_here(part, Check(name, "cpu", True, Path(sys.argv[2]), 0.0)))
"""


def test_a_part_that_fails_takes_no_other_with_it(tmp_path, capsys):
    script = tmp_path / "parts.py"
    script.write_text(PART.format(benchmarks=str(BENCHMARKS)))
    names = ("raises", "crashes", "hangs", "fine", "too late")
    parts = {name: Part(lambda check: None, 3 if name == "hangs" else 30) for name in names}

    def command(name: str, limit: float) -> list[str]:
        if name == "fine":  # the next one comes too late
            time.sleep(max(0.0, end - time.monotonic() - 0.9))
        return [sys.executable, str(script), name, str(tmp_path)]

    Results(tmp_path).add("header", "header", versions={}, machine={"device_name": "x"}, date="", tiny=True)
    end = time.monotonic() + 12
    run_parts(parts, command, tmp_path, total=12)
    records = Results(tmp_path).latest()
    errors = {record["part"]: record["error"] for record in records if record["name"] == "end"}
    assert errors == {
        "raises": "ValueError: no such thing",
        "crashes": "killed by SIGABRT",
        "hangs": "stopped at its limit of 3 s",
        "fine": None,
        "too late": "not started: the 12 s for all parts were over",
    }
    assert [r["part"] for r in records if r["name"] == "before"] == ["raises", "crashes", "hangs"]
    assert [r["number"] for r in records if r["part"] == "fine" and r["name"] == "value"] == [1]
    assert "Traceback" in (tmp_path / "raises.log").read_text() and not (tmp_path / "fine.log").exists()
    (child,) = [record["child"] for record in records if "child" in record]
    assert not _alive(child)
    records[0]["versions"] = dict.fromkeys(("fusedres", "torch", "cuda", "triton"), "0")
    summary = gpu_check.summary(records, parts)
    assert "\nhangs: stopped at its limit of 3 s\n" in summary and "\nfine: done in " in summary
    assert "crashes (up to" in capsys.readouterr().out


def _alive(pid: int) -> bool:
    for _ in range(20):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_output_of_pytest_is_understood():
    output = """
tests/test_a.py::test_one[cuda-(1, 2)] PASSED                [ 10%]
tests/test_a.py::test_two[cuda] FAILED                       [ 20%]
tests/test_a.py::test_three SKIPPED (needs a b)              [ 30%]
tests/test_a.py::test_four PASSED                            [ 40%]
tests/test_a.py::test_four ERROR                             [ 40%]
tests/test_a.py::test_five[a b]"""
    facts = gpu_check_net.parse_tests(output)
    assert (facts["passed"], facts["failed"], facts["skipped"]) == (1, 2, 1)
    assert facts["failures"] == ["tests/test_a.py::test_two[cuda]", "tests/test_a.py::test_four"]
    assert facts["stopped_in"] == "tests/test_a.py::test_five[a b]"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--parts", "copy,speed"],
            2,
            "no part 'speed', there are correct, copy, autotune, train, inference, convs, folded, stem, ",
        ),
        (["--device", "cpu"], 2, "--device cpu needs --tiny: the full sizes are a GPU's"),
        (["--parts", "copy"], 1, "no CUDA GPU was found by PyTorch"),
        (
            ["--device", "cpu", "--tiny", "--out", "{file}/results"],
            1,
            "can't write into {file}/results: Not a",
        ),
    ],
)
def test_errors_are_one_line(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "file"
    file.touch()
    assert gpu_check.main([argument.format(file=file) for argument in arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith(f"gpu_check: error: {message.format(file=file)}") and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_list_and_help(capsys):
    assert gpu_check.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_check.PARTS)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--help"])
    assert stop.value.code == 0 and "examples:\n  python benchmarks/gpu_check.py" in capsys.readouterr().out


def test_the_fused_convolutions_beside_pytorchs(tiny):
    _, records, _ = tiny
    found = [record for record in records if record["part"] == "convs" and "ms" in record]
    of = {dtype: [r for r in found if r["dtype"] == dtype] for dtype in ("bfloat16", "float16", "float32")}
    assert {dtype: len(found) for dtype, found in of.items()} == {"bfloat16": 69, "float16": 9, "float32": 9}
    for record in found:
        assert record["times_plain"] == pytest.approx(record["plain_ms"] / record["ms"])
        assert record["times_composed"] == pytest.approx(record["composed_ms"] / record["ms"])
        assert record["share_of_floor"] == pytest.approx(record["floor_ms"] / record["ms"])
    (reason,) = [
        record["reason"] for record in records if record["part"] == "autotune" and "reason" in record
    ]
    assert reason.startswith("autotune needs a GPU with fused convolutions")


def test_the_limits_fit_into_nine_minutes():
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= gpu_check.TOTAL < 9 * 60
