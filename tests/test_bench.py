"""``fusedres bench``: what it measures, writes and refuses, on a model small enough to wait for."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedres
from fusedres import kernels, plan
from fusedres.cli import main
from fusedres.cli.bench import breakdown, check, eager, measure, workload
from fusedres.cli.errors import CommandError, writing
from fusedres.cli.options import DTYPES

CPU = torch.device("cpu")
TINY = (
    "bench",
    "--model",
    "resnet18",
    "--batch",
    "2",
    "--image-size",
    "64",
    "--device",
    "cpu",
    "--rounds",
    "2",
    "--warmup",
    "1",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    # the reference kernels are there, compiled module or not
    with fusedres.backend("reference"):
        assert main([*TINY, "--dtype", "fp32", "--json", str(path)]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_report_says_what_ran(report: dict[str, Any]) -> None:
    assert set(report) == {"command", "date", "versions", "machine", "settings", "results"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["fusedres"] == fusedres.__version__
    assert report["command"].startswith("fusedres bench --model resnet18 --batch 2 ")
    assert report["machine"]["threads"] == 1
    assert report["machine"]["device_name"]
    assert report["settings"] == {
        "model": "resnet18",
        "batch": 2,
        "image_size": 64,
        "dtype": "fp32",
        "layout": "channels_last",
        "device": "cpu",
        "warmup": 1,
        "seed": 0,
        "backend": "reference",
    }
    train, inference = report["results"]
    assert (train["mode"], inference["mode"]) == ("train", "inference")
    assert train["rounds"] == inference["rounds"] == 2
    described = {
        name: side["description"]
        for entry in (inference, train)
        for name, side in entry["implementations"].items()
    }
    assert described["fused"] == f"fusedres {fusedres.__version__}, reference kernels"
    assert described["folded"].startswith("eager with its batch norms folded")
    fused, eager_side = (inference["implementations"][name]["description"] for name in ("fused", "eager"))
    assert "optimize_for_inference to float32" in fused
    assert eager_side == f"{described['eager']}, converted to float32"


def test_the_report_has_every_figure(report: dict[str, Any]) -> None:
    for entry in report["results"]:
        sides = entry["implementations"]
        assert list(sides) == ["fused", "eager", *(["folded"] if entry["mode"] == "inference" else [])]
        for side in sides.values():
            ms = side["ms"]
            assert len(ms["all"]) == 2
            assert 0 < ms["min"] <= ms["median"] <= ms["max"]
            assert ms["p50"] == ms["median"] and ms["p90"] == ms["p99"] == ms["max"]
            assert side["images_per_second"] == pytest.approx(2e3 / ms["median"])
            assert side["ratio_to_eager"] == pytest.approx(sides["eager"]["ms"]["median"] / ms["median"])
            # an activation of the stem alone takes 2 * 64 * 32 * 32 * 4 bytes
            assert side["peak_bytes"] > 2 * 64 * 32 * 32 * 4
            assert side["minor_faults"] >= 0
            assert 0 <= side["output_error"] < 1e-4
            parts = side["breakdown_ms"]
            assert parts["convolution"] + parts["fusedres convolution"] > 0
        assert entry["ceiling"] > 1
    train, inference = report["results"]
    assert train["notes"] == []
    assert all(side["startup_s"] is None for side in train["implementations"].values())
    assert all(side["startup_s"] > 0 for side in inference["implementations"].values())
    assert all(0 < side["gradient_error"] < 0.1 for side in train["implementations"].values())
    assert all(side["gradient_error"] is None for side in inference["implementations"].values())


def test_the_breakdown_tells_our_kernels_from_aten(report: dict[str, Any]) -> None:
    train = report["results"][0]
    fused, plain = (train["implementations"][name]["breakdown_ms"] for name in ("fused", "eager"))
    assert train["fused_norm_share"] == 1
    assert train["fused_convolution_share"] > 0.5
    assert fused["fusedres batch norm"] > 0 and fused["batch norm, ReLU"] == 0
    assert plain["fusedres batch norm"] == 0 and plain["batch norm, ReLU"] > 0
    assert plain["optimizer"] > 0


def test_the_breakdown_tells_a_pass_of_its_own_from_none(report: dict[str, Any]) -> None:
    """The reference kernels add bias and residual and apply the ReLU by PyTorch's operators."""
    inference = report["results"][1]
    assert inference["one_pass_share"] == {"fused": 0, "eager": 0, "folded": 0}
    assert inference["notes"] == ["no convolution of the fused side took its ReLU in"]
    for side in inference["implementations"].values():
        assert side["breakdown_ms"]["batch norm, ReLU"] > 0
        assert side["breakdown_ms"][breakdown.ONE_PASS] == 0


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with fusedres.backend("reference"):
        assert main([*TINY, "--train"]) == 0
    out = capsys.readouterr().out
    assert "resnet18, batch 2, 64 px, bf16, channels_last, cpu" in out
    for head in ("img/s", "ms (min to max)", "ratio", "peak memory", "page faults", "gradient error"):
        assert head in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("fused ", "eager "))}
    assert "1.00x" in rows["eager"]
    assert "share of batch-norm time in fusedres kernels: 100%" in out
    assert "share of convolution time in fusedres kernels: " in out
    assert "ceiling: " in out
    assert "inference" not in out and "note: " not in out


def test_a_run_that_fused_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fusedres.ops.choice", lambda *problem: plan.Choice("aten", "the kernels are on holiday")
    )
    assert main([*TINY, "--train"]) == 0
    out = capsys.readouterr().out
    assert "share of batch-norm time in fusedres kernels: 0%" in out
    assert "note: nothing was fused because: the kernels are on holiday" in out


@pytest.mark.skipif("cpu" in kernels.unavailable(), reason="needs the compiled module")
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_the_compiled_kernels_pass_the_check(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fusedres.backend("cpu"):
        assert main([*TINY, "--layout", layout]) == 0
    assert "share of batch-norm time in fusedres kernels: 100%" in capsys.readouterr().out


def tampered(wrong: str) -> fusedres.ResNet18:
    """A ResNet-18 that is a little wrong."""
    model = fusedres.ResNet18()
    if wrong == "logits":
        model.fc.register_forward_hook(lambda module, inputs, output: 1.001 * output)
    if wrong == "nan":
        model.fc.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    if wrong == "layer2.0.bn1.weight":
        model.layer2[0].bn1.weight.register_hook(lambda gradient: 1.2 * gradient)
    if wrong == "layer3.1.conv1.weight":
        model.layer3[1].conv1.weight.requires_grad_(False)
    if wrong == "layer1.0.bn1.running_":
        model.layer1[0].bn1.momentum = 0.2
    return model


@pytest.mark.parametrize(
    "wrong", ["logits", "nan", "layer2.0.bn1.weight", "layer3.1.conv1.weight", "layer1.0.bn1.running_"]
)
def test_a_wrong_model_is_not_timed(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tampered(wrong)
    monkeypatch.setattr("fusedres.cli.bench.build", lambda name, classes: model)
    assert main([*TINY, "--dtype", "fp32", "--train", "--json", str(tmp_path / "out.json")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fusedres: error: the check failed, nothing was timed: training step, ")
    assert err.count("\n") == 1
    assert wrong in err or wrong == "nan"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_check_is_not_chance(dtype: str) -> None:
    """Eager PyTorch passes for fused, in another memory layout, whatever the seed."""
    for seed in range(3):
        torch.manual_seed(seed)
        batch = workload.make(2, 64, torch.float32, torch.channels_last, CPU, seed)
        model = eager.EagerResNet("resnet18")
        workload.prepare(model, batch.images)
        batch = workload.Workload(batch.images, batch.labels, DTYPES[dtype])
        nchw = workload.Workload(batch.images.contiguous(), batch.labels, batch.dtype)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen = []
        for work in (batch, nchw):
            model.load_state_dict(weights)
            expected = check.reference(model, work, "train")
            seen.append(check.errors(check.observe(model, work, "train"), expected))
        assert check.failure(seen[0], seen[1], batch.dtype) is None
        assert check.failure(seen[1], seen[0], batch.dtype) is None


def test_a_tensor_that_is_missing_or_not_finite_is_wrong() -> None:
    one = torch.ones(3)
    for bad in (one * math.inf, one * math.nan, torch.ones(4)):
        assert check.errors(({"a": bad}, {}), ({"a": one}, {})).outputs["a"] == math.inf
    assert check.errors(({}, {}), ({"a": one}, {})).outputs["a"] == math.inf


def test_fp16_gradients_are_scaled_back() -> None:
    batch = workload.make(2, 64, torch.float32, torch.channels_last, CPU, 0)
    model = eager.EagerResNet("resnet18")
    workload.prepare(model, batch.images)
    scaled = workload.Workload(batch.images, batch.labels, torch.float16)
    assert scaled.loss_scale != 1
    observed = check.observe(model, workload.Workload(batch.images, batch.labels, torch.float32), "train")
    halves = check.observe(model, scaled, "train")
    errors = check.errors(halves, observed)
    assert errors.outputs["loss"] < 0.01
    assert errors.gradients["fc.weight"] < 0.05


def test_the_eager_twin_of_a_net_for_cifar() -> None:
    """With the fused one's keys, and its outputs in fp64."""
    torch.manual_seed(0)
    plain, fused = eager.build("resnet20")[0].double(), fusedres.CifarResNet(20).double()
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-10, atol=1e-10)


def test_a_net_for_cifar(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["bench", "--model", "resnet8", "--batch", "4", "--device", "cpu", "--rounds", "1"]
    with fusedres.backend("reference"):
        assert main([*arguments, "--train", "--dtype", "fp32", "--warmup", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["settings"]["image_size"] == 32 and found["results"][0]["fused_norm_share"] == 1


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_eager_twin_is_torchvisions_net(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(), eager.EagerResNet(name)
    assert [(key, value.shape) for key, value in sorted(ours.state_dict().items())] == [
        (key, value.shape) for key, value in sorted(theirs.state_dict().items())
    ]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_eager_twin_runs_torchvisions_operators(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    ours = eager.EagerResNet(name)
    theirs = getattr(torchvision.models, name)()
    theirs.load_state_dict(ours.state_dict())
    batch = workload.make(2, 64, torch.float32, torch.channels_last, CPU, 0)
    seen = []
    for model in (ours, theirs):
        recorded = breakdown.record(lambda net=model: workload.loss(net, batch)[1].backward(), CPU)
        names = [event.name for event in recorded.events() or () if event.name.startswith("aten::")]
        seen.append((names, workload.loss(model, batch)[0]))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_rounds_alternate_in_both_orders() -> None:
    ran: list[str] = []
    steps = {name: lambda name=name: ran.append(name) for name in "ab"}
    samples = measure.interleave(steps, rounds=3, warmup=1, device=CPU, label="")
    assert "".join(ran) == "abbaabba"
    assert all(len(found.ms) == len(found.faults) == 3 for found in samples.values())


def test_the_peak_counts_what_is_held_at_once() -> None:
    def step() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(3000, dtype=torch.uint8)
        del a
        c = torch.empty(500, dtype=torch.uint8)
        del b, c

    # allocations are rounded up to 64 bytes
    assert 4000 <= measure.peak_bytes(step, CPU) < 4200


def test_page_faults_are_those_of_the_step() -> None:
    page, size = 4096, 256 << 20
    touch = {"touch": lambda: torch.ones(size, dtype=torch.uint8)}
    faults = measure.interleave(touch, 3, 1, CPU, "")["touch"].median_faults
    # more than malloc keeps for itself: it comes fresh from the system every time, in huge pages where it
    # has them
    assert faults is not None
    assert 0 < faults < 2 * size / page


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="one compiler is enough")
def test_compile_is_a_third_side(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with fusedres.backend("reference"):
        assert main([*TINY, "--compile", "--train", "--dtype", "fp32", "--json", str(path)]) == 0
    sides = json.loads(path.read_text())["results"][0]["implementations"]
    assert list(sides) == ["fused", "eager", "compile"]
    assert sides["compile"]["output_error"] < 1e-4


def test_a_compiler_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        model.register_forward_hook(lambda *_: 1 / 0)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    for mode in ("--train", "--inference"):
        with fusedres.backend("reference"):
            assert main([*TINY, "--compile", mode]) == 1
        assert capsys.readouterr() == ("", "fusedres: error: torch.compile failed: division by zero\n")


def test_too_large_a_batch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for batch in (10**9, 10**17):
        assert main(["bench", "--device", "cpu", "--batch", str(batch)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert "out of memory, try a smaller --batch" in err


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    with fusedres.backend("reference"):
        assert main([*TINY, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    message = r"can't write out\.json: .*No space left"
    with pytest.raises(CommandError, match=message), writing(Path("out.json")):
        Path("/dev/full").write_text("x")
