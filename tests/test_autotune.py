"""autotune: what is measured, what is kept on disk, and what a broken file does."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedres import autotune, kernels, ops, plan
from fusedres.cli import autotune as command
from fusedres.cli import main
from fusedres.cli.errors import CommandError

pytest.importorskip("triton")
from fusedres.kernels.triton import conv_config, settings  # noqa: E402

GPU = "Some GPU"
DEVICE = torch.device("cuda", 0)
CONV = plan.Conv(8, 64, 14, 14, 64, 3, 1, pending=True)
PROBLEM = conv_config.ConvProblem(8 * 14 * 14, 64, 64, 9, 2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU of compute capability 9.0 that measures what ``us`` says, by name ("": any kernel's)."""
    facts = SimpleNamespace(us={"": 10.0, "aten": 20.0}, measured=[], cache=tmp_path)

    def timed(runs: dict[str, Any], device: torch.device) -> dict[str, float]:
        for run in runs.values():
            run()
        facts.measured.append(tuple(runs))
        return {name: facts.us.get(name, facts.us[""]) for name in runs}

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(kernels, "unavailable", dict)
    monkeypatch.setattr(kernels, "cuda_architectures", lambda: ("90a",))
    monkeypatch.setattr(autotune, "timed", timed)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    new_process()
    yield facts
    new_process()


def new_process() -> None:
    """Forget what a process remembers."""
    plan.MEASURED.clear()
    conv_config.PREFERRED.clear()
    for cache in (autotune.load, autotune._name, autotune._tell_once, ops.choice):
        cache.cache_clear()


def launch(fused: bool) -> str:
    """Stands for a convolution: a kernel asks for its launch setting."""
    return str(conv_config.select("conv_fwd", PROBLEM, (9, 0))) if fused else "aten"


def fused(op: str = "conv_fwd", conv: plan.Conv = CONV, run: Any = launch) -> bool:
    x = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16)
    return autotune.fused(op, x, conv, run)


@pytest.mark.parametrize(("ours", "expected"), [(10.0, True), (30.0, False)])
def test_the_faster_one_runs(gpu, ours, expected):
    gpu.us[""] = ours
    assert fused() == expected
    assert fused() == expected
    assert len(gpu.measured) == 1 and gpu.measured[0][0] == "aten"
    choice = ops.choice("conv_fwd", DEVICE, torch.bfloat16, "auto", CONV)
    assert choice.implementation == ("triton" if expected else "aten")
    assert choice.reason.startswith("measured ") and "aten 20 us" in choice.reason


def test_another_process_reads_it(gpu):
    gpu.us[""] = 30.0
    assert not fused()
    new_process()
    assert not fused()
    assert len(gpu.measured) == 1


def test_the_cuda_kernel_is_a_candidate(gpu):
    gpu.us["cuda"] = 5.0
    forced = []

    def run(is_fused):
        forced.append((is_fused, ops.forced_backend()))
        return launch(is_fused)

    assert fused(run=run)
    assert (True, "cuda") in forced and (True, "triton") in forced and (False, "auto") in forced
    assert gpu.measured[0][-1] == "cuda"
    choice = ops.choice("conv_fwd", DEVICE, torch.bfloat16, "auto", CONV)
    assert choice.implementation == "cuda" and "cuda 5 us" in choice.reason
    new_process()
    assert fused() and len(gpu.measured) == 1, "another process takes it, too"
    assert ops.choice("conv_fwd", DEVICE, torch.bfloat16, "auto", CONV).implementation == "cuda"
    fused("conv_wgrad")
    assert "cuda" not in gpu.measured[1], "it has no kernel for every op"


def test_each_op_and_shape_by_itself(gpu):
    fused(), fused("conv_wgrad"), fused(conv=CONV._replace(pending=False))
    assert len(gpu.measured) == 3
    assert len(autotune.read(autotune.path(GPU), GPU)) == 3


def test_a_trained_nets_convolution(gpu):
    """cuDNN's until it is measured, but for 3x3 of 64 channels."""
    narrow = CONV._replace(pending=False)
    for conv, expected in ((narrow, "triton"), (narrow._replace(channels=256, side=1), "aten")):
        choice = ops.choice("conv_bias_act", DEVICE, torch.bfloat16, "auto", conv)
        assert choice.implementation == expected and choice.open and "not measured" in choice.reason
        gpu.us[""] = 30.0 if expected == "triton" else 10.0
        assert fused("conv_bias_act", conv) == (expected == "aten"), "what was measured holds"
    assert len(gpu.measured) == 2
    assert not plan.conv.likely("conv_bias_act", narrow._replace(ieee=True), "float32")[0]


def test_deterministic_mode_measures_nothing(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        first = fused()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not gpu.measured and first == plan.conv.likely("conv_fwd", CONV, "bfloat16")[0]
    gpu.us[""] = 30.0
    fused()
    torch.use_deterministic_algorithms(True)
    try:
        assert not fused(), "what was measured before holds"
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_measured_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fused()
    assert not gpu.measured


def test_nothing_is_measured_where_no_kernel_can_serve(gpu):
    assert not fused(conv=CONV._replace(channels=12))
    assert not fused(conv=CONV._replace(groups=2))
    with ops.backend("triton"):
        assert fused()
    assert not gpu.measured


def test_it_is_on_disk_before_it_is_used(gpu):
    seen = []

    def run(is_fused):
        seen.append(autotune.path(GPU).exists())
        return launch(is_fused)

    fused(run=run)
    assert not any(seen) and autotune.path(GPU).exists()


def test_a_kernel_that_fails_leaves_pytorchs(gpu):
    def run(is_fused):
        if is_fused:
            raise RuntimeError("out of resource: shared memory")

    with pytest.warns(UserWarning, match="can't be measured: out of resource: shared memory"):
        assert not fused(run=run)
    assert gpu.measured == [("aten",)]


def test_without_memory_for_both_ways_nothing_is_kept(gpu):
    def run(is_fused):
        raise torch.OutOfMemoryError("no")

    fused(run=run)
    assert not plan.MEASURED and not autotune.path(GPU).exists()


BROKEN = {
    "empty": "",
    "cut off": '{"versions": {"fusedres"',
    "not an object": "[1, 2]",
    "no entries": "{}",
    "binary": "\x00\x01\x02",
    "entries of another kind": json.dumps({"versions": None, "entries": [1]}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_and_written_anew(gpu, text):
    file = autotune.path(GPU)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match="is ignored and will be written anew"):
        assert fused()
    assert len(autotune.read(file, GPU)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["versions"].update(torch="1.0"),
        lambda content: content["versions"].update(device="Another GPU"),
        lambda content: content["entries"][0].update(best="magic"),
        lambda content: content["entries"][0].update(us={"aten": "fast"}),
        lambda content: content["entries"][0].update(us={"aten": float("nan")}),
        lambda content: content["entries"][0].pop("conv"),
        lambda content: content["entries"][0].update(conv=[1, 2]),
        lambda content: content["entries"][0].update(settings=[["conv_fwd", [1, 2], {}]]),
        lambda content: content["entries"][0].update(settings=7),
    ],
)
def test_a_foreign_or_wrong_file_is_ignored(gpu, change):
    fused()
    file = autotune.path(GPU)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    new_process()
    with pytest.warns(UserWarning, match="is ignored and will be written anew"):
        assert fused()
    assert len(gpu.measured) == 2
    new_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused()
    assert len(gpu.measured) == 2


def test_where_nothing_can_be_written_it_is_kept_in_memory(gpu, monkeypatch):
    (gpu.cache / "fusedres").write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="kept for this process alone"):
        assert fused()
    assert fused() and len(gpu.measured) == 1


def _write(folder: str, first: int) -> None:
    torch.hub.get_dir = lambda: f"{folder}/hub"
    for batch in range(first, first + 20):
        key = plan.Key(GPU, "conv_fwd", "bfloat16", CONV._replace(batch=batch))
        autotune.save(DEVICE, key, plan.Measured("aten", {"aten": 1.0}, []))


def test_two_processes_write_at_once(gpu):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(gpu.cache), first)) for first in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(autotune.read(autotune.path(GPU), GPU)) == 40
    assert [p.suffix for p in autotune.path(GPU).parent.iterdir()].count(".json") == 1


class TestSearch:
    def test_every_setting_is_measured_and_the_best_is_kept(self, gpu):
        valid = [
            c for c in conv_config.CONFIGS["conv_fwd"] if conv_config.is_valid("conv_fwd", c, PROBLEM, (9, 0))
        ]
        assert len(valid) > 1
        gpu.us[str(valid[-1])] = 1.0
        found = []
        fused()
        with autotune.searching(lambda *result: found.append(result)):
            assert fused()
            assert fused()
        assert gpu.measured[1] == ("aten", *map(str, valid), "cuda")
        assert len(gpu.measured) == 2, "once in a search, though it was measured before"
        ((op, conv, measured),) = found
        assert (op, conv, measured.best) == ("conv_fwd", CONV, "triton")
        assert launch(True) == str(valid[-1])
        new_process()
        assert fused() and launch(True) == str(valid[-1]), "another process launches with it, too"
        assert len(gpu.measured) == 2

    def test_a_trial_leaves_nothing_behind(self):
        before = launch(True)
        with settings.trial(1) as seen:
            assert launch(True) != before
        assert launch(True) == before and len(seen) == 1
        with pytest.raises(settings.NoSuchSetting), settings.trial(99):
            launch(True)
        assert settings.parse(json.loads(json.dumps(settings.dump(seen)))) == seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_prediction(dtype):
    """Where memory bounds a layer fusion is predicted to pay; where arithmetic does it isn't."""
    bound_by_memory = plan.Conv(256, 64, 56, 56, 256, 1, 1, pending=True)
    bound_by_arithmetic = plan.Conv(256, 512, 7, 7, 512, 3, 1, pending=True)
    for op in plan.CONV_OPS:
        assert plan.conv.likely(op, bound_by_memory, dtype)[0]
    pays, why = plan.conv.likely("conv_fwd", bound_by_arithmetic, dtype)
    assert not pays and "predicted" in why and "not measured" in why


class TestCommand:
    """fusedres autotune; what it measures with is in the classes above."""

    def test_without_a_gpu_it_says_so(self, capsys):
        assert main(["autotune", "resnet18", "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(
            "fusedres: error: autotune measures fused convolutions, and there are none for"
        )
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("patch", "message"),
        [
            (
                {"kernels.unavailable": lambda: {"triton": "triton is not installed", "cuda": "no nvcc"}},
                "triton: triton is not installed; cuda: no nvcc",
            ),
            ({"ops.forced_backend": lambda: "cuda"}, "FUSEDRES_BACKEND forces cuda"),
            ({"torch.are_deterministic_algorithms_enabled": lambda: True}, "use_deterministic_algorithms"),
            ({"torch.cuda.get_device_capability": lambda device: (7, 5)}, "compute capability 7.5"),
        ],
    )
    def test_what_stands_against_it(self, gpu, monkeypatch, patch, message):
        for name, value in patch.items():
            monkeypatch.setattr(name if name.startswith("torch.") else f"fusedres.{name}", value)
        with pytest.raises(CommandError, match=message):
            command._check(DEVICE, torch.bfloat16)

    def test_the_table(self):
        results = [
            command.Result("conv_fwd", CONV, plan.Measured("triton", {"aten": 30.0, "128x64": 20.0}, [])),
            command.Result("conv_wgrad", CONV, plan.Measured("aten", {"aten": 9.0, "128x64": 20.0}, [])),
        ]
        head, first, second = command.table(results).splitlines()
        assert head.split() == ["op", "convolution", "best", "us", "aten", "us", "ratio"]
        assert first.split()[-4:] == ["128x64", "20.0", "30.0", "1.50x"]
        assert second.split()[-4:] == ["aten", "9.0", "9.0", "1.00x"]
        assert json.loads(json.dumps([command._plain(r) for r in results]))[0]["us"]["aten"] == 30.0
