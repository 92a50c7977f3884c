"""``fusedres bench --inference``: its sides, other engines among them, and how they take turns."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.cli import bench, main
from fusedres.cli.bench import breakdown, check, eager, measure, peers, sides, workload
from fusedres.cli.bench.peers import Peer
from fusedres.cli.bench.workload import Workload
from fusedres.cli.errors import USAGE, CommandError

CPU = torch.device("cpu")
SIZE = 64
TINY = ("bench", "--model", "resnet18", "--batch", "2", "--image-size", str(SIZE), "--device", "cpu")
TINY = (*TINY, "--inference", "--rounds", "5", "--warmup", "1", "--threads", "1")
FLOORS = check.OUTPUT_FLOOR

one_pass = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
compiles = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="one compiler is enough"
)


def net_and_batch(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Workload]:
    """A plain ResNet-18 in evaluation mode, with running statistics of its own."""
    torch.manual_seed(0)
    batch = workload.make(2, SIZE, dtype, torch.channels_last, CPU, 0)
    net = eager.EagerResNet("resnet18").to(memory_format=torch.channels_last)
    workload.prepare(net, batch.images)
    return net.eval(), batch


def error(forward: workload.Forward, net: nn.Module, batch: Workload) -> float:
    """Of the logits, against float64."""
    wide = dataclasses.replace(batch, dtype=torch.float32)
    return check.errors(check.infer(forward, batch), check.reference(net, wide, "inference")).worst_output


def bench_json(path: Path, *argv: str) -> dict[str, Any]:
    assert main([*TINY, *argv, "--json", str(path)]) == 0
    entry: dict[str, Any] = json.loads(path.read_text())["results"][0]
    return entry


# the sides that PyTorch runs


@one_pass
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_sides_compute_the_same(dtype: str, layout: str, tmp_path: Path) -> None:
    entry = bench_json(tmp_path / "out.json", "--dtype", dtype, "--layout", layout)
    assert list(entry["implementations"]) == ["fused", "eager", "folded"]
    for side in entry["implementations"].values():
        assert 0 < side["output_error"] < (1e-5 if dtype == "fp32" else 0.05)
        assert len(side["ms"]["all"]) == 5


@one_pass
def test_the_fused_side_runs_each_convolution_in_one_pass(tmp_path: Path) -> None:
    entry = bench_json(tmp_path / "out.json", "--dtype", "fp32")
    assert entry["one_pass_share"] == {"fused": 1, "eager": 0, "folded": 0}
    assert entry["notes"] == []
    parts = {name: side["breakdown_ms"] for name, side in entry["implementations"].items()}
    assert parts["fused"]["convolution"] == parts["fused"]["batch norm, ReLU"] == parts["fused"]["add"] == 0
    assert parts["folded"]["batch norm, ReLU"] < parts["eager"]["batch norm, ReLU"]


@one_pass
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--peers", "--dtype", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "inference, median of 5 interleaved steps" in out
    for head in ("img/s", "p50 ms", "p90 ms", "p99 ms", "ratio", "start-up s", "peak memory", "output error"):
        assert head in out
    assert "gradient error" not in out and "batch-norm time" not in out
    assert "share of convolution time in one pass with bias, add and ReLU: fused " in out
    assert "note: ONNX Runtime is left out: it has no fp16 on a CPU" in out
    assert "note: OpenVINO is left out: it has no fp16 on a CPU" in out


def test_eager_is_converted_once() -> None:
    net, batch = net_and_batch(torch.bfloat16)
    side = sides.Converted(net, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    events = breakdown.record(workload.inference_step(side, batch), CPU).events() or ()
    # images, logits and the pool's sums; autocast would have a weight a convolution besides
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert sum(event.name == "aten::_to_copy" for event in events) < convolutions / 2
    logits = check.infer(side, batch)[0]["logits"]
    assert logits.dtype == torch.float32
    assert error(side, net, batch) < 0.05


@pytest.mark.parametrize("build", [lambda name: eager.EagerResNet(name), lambda name: eager.build(name)[0]])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_leaves_no_batch_norm(name: str, build: Callable[[str], nn.Module]) -> None:
    torch.manual_seed(0)
    batch = workload.make(2, SIZE, torch.float32, torch.channels_last, CPU, 0)
    net = build(name)
    workload.prepare(net, batch.images)
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = sides.folded(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert error(folded, net, batch) < FLOORS[torch.float32]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@compiles
def test_compile_freezes_and_puts_the_setting_back(tmp_path: Path) -> None:
    from torch._inductor import config

    assert not config.freezing
    entry = bench_json(tmp_path / "out.json", "--compile", "--dtype", "fp32")
    assert not config.freezing
    assert list(entry["implementations"]) == ["fused", "eager", "folded", "compile"]
    assert entry["implementations"]["compile"]["output_error"] < 1e-5
    assert entry["implementations"]["compile"]["startup_s"] > 0
    # only frozen weights are folded, and so computed in one pass
    assert entry["one_pass_share"]["compile"] == entry["one_pass_share"]["fused"]


def test_a_wrong_model_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    optimise = fusedres.optimize_for_inference

    def wrong(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        return optimise(model, dtype)

    monkeypatch.setattr(fusedres, "optimize_for_inference", wrong)
    assert main([*TINY, "--dtype", "fp32", "--json", str(tmp_path / "out.json")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "fusedres: error: the check failed, nothing was timed: inference, the output logits"
    )
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# other engines


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("onnxruntime", torch.float32), ("openvino", torch.float32), ("openvino", torch.bfloat16)],
    ids=str,
)
def test_a_peer_computes_the_same_with_as_many_threads(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip(name)
    kind = "InferenceSession" if name == "onnxruntime" else "Core"
    threads = []
    if name == "onnxruntime":
        open_session = package.InferenceSession

        def session(file: Path, options: Any, providers: list[str]) -> Any:
            threads.append(options.intra_op_num_threads)
            assert providers == ["CPUExecutionProvider"]
            return open_session(file, options, providers=providers)

        monkeypatch.setattr(package, kind, session)
    else:

        class Core(package.Core):  # type: ignore[misc, name-defined]
            def compile_model(self, *args: Any) -> Any:
                compiled = super().compile_model(*args)
                threads.append(compiled.get_property("INFERENCE_NUM_THREADS"))
                return compiled

        monkeypatch.setattr(package, kind, Core)
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    net, batch = net_and_batch(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        try:
            peer.check(dtype)
            forward = peer.build(net, batch)
        except CommandError as reason:
            pytest.skip(str(reason))
        assert threads == [1]
        assert error(forward, net, batch) < (0.05 if dtype == torch.bfloat16 else FLOORS[dtype])
    finally:
        torch.set_num_threads(before)
    assert peer.description(dtype).startswith(f"{peer.title} {package.__version__.split('-')[0]}")


def test_peers_are_sides_of_the_report(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    entry = bench_json(tmp_path / "out.json", "--peers", "--dtype", "fp32", "--plot", str(picture))
    assert list(entry["implementations"]) == ["fused", "eager", "folded", "onnxruntime", "openvino"]
    for name in ("onnxruntime", "openvino"):
        side = entry["implementations"][name]
        assert side["output_error"] < 1e-5 and side["startup_s"] > 0
        # of memory that isn't PyTorch's it knows nothing
        assert side["peak_bytes"] is None and side["breakdown_ms"] is None
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_missing_package_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    entry = bench_json(tmp_path / "out.json", "--peers", "--dtype", "fp32")
    assert list(entry["implementations"]) == ["fused", "eager", "folded"]
    onnx, openvino = [note for note in entry["notes"] if "left out" in note]
    assert onnx.startswith("ONNX Runtime is left out: ") and "pip install onnxruntime" in onnx
    assert openvino.startswith("OpenVINO is left out: ") and "pip install openvino" in openvino


def test_a_package_that_the_export_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CommandError, match="ONNX Runtime needs onnx: pip install onnx"):
        peers.PEERS[0].check(torch.float32)


def fake(monkeypatch: pytest.MonkeyPatch, forward: workload.Forward) -> None:
    """An engine that takes any model and is in a package that is there."""
    monkeypatch.setattr(
        peers, "PEERS", (Peer("numpy", "Engine", (torch.float32,), lambda model, batch: forward),)
    )


def test_a_peer_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(images: Tensor) -> Tensor:
        raise ValueError("no such operator\nand a page of hints")

    fake(monkeypatch, fails)
    entry = bench_json(tmp_path / "out.json", "--peers", "--dtype", "fp32")
    assert "Engine is left out: it failed, ValueError: no such operator" in entry["notes"]
    assert list(entry["implementations"]) == ["fused", "eager", "folded"]


def test_a_peer_that_is_wrong_is_measured_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, lambda images: torch.zeros(len(images), workload.CLASSES))
    assert main([*TINY, "--peers", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "note: numpy would not pass the check: the output logits errs by 1, " in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("numpy "))
    assert row[-1] == "1.0e+00" and row.count("-") == 1


def test_peers_compute_on_a_cpu_only() -> None:
    args = argparse.Namespace(peers=True, mode="inference")
    with pytest.raises(CommandError, match="--peers measures on the CPU only") as raised:
        bench._check_settings(args, torch.device("cuda"))
    assert raised.value.status == USAGE


# time


def test_a_turn_is_an_untimed_step_and_a_few_timed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: ran.append("-"))
    steps = {name: lambda name=name: ran.append(name) for name in "ab"}
    samples = measure.take_turns(steps, rounds=6, warmup=2, label="")
    assert "".join(ran) == "aabb" + "-aaaaa-bbbbb" + "-bbb-aaa"
    assert all(len(found.ms) == len(found.faults) == 6 for found in samples.values())


def test_percentiles_are_times_that_were_measured() -> None:
    samples = measure.Samples([float(ms) for ms in range(200, 0, -1)])
    assert [samples.percentile_ms(percent) for percent in (50, 90, 99, 100)] == [100, 180, 198, 200]
    few = measure.Samples([3.0, 1.0, 2.0])
    assert [few.percentile_ms(percent) for percent in (50, 90, 99)] == [2, 3, 3]


def test_small_batches_get_more_rounds() -> None:
    def rounds(images: int) -> int:
        return bench._rounds(
            "inference", workload.make(images, 32, torch.float32, torch.channels_last, CPU, 0)
        )

    assert rounds(1) >= 100 > rounds(2) > rounds(4) > rounds(16) == rounds(32)
