"""The command line: help, bad input, ``info`` and ``predict``; ``bench`` has a file of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedres
from fusedres import kernels, plan
from fusedres.cli import machine, main

COMMANDS = ("autotune", "bench", "eval", "experiment", "info", "predict", "quantize", "report", "train")
CLASSES = 7


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Run a command that fails; its status and its one line."""
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as exit:  # argparse's
        status = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert status != 0
    assert out == ""
    assert err.startswith("fusedres: error: ") and err.count("\n") == 1, err
    return status, err


def process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusedres", *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    torch.save(fusedres.ResNet18(num_classes=CLASSES).state_dict(), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


# help and the shape of the command line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_description_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  fusedres {command}" in out
    assert "default" in out or command in ("experiment", "info")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command}" in out for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fusedres {fusedres.__version__}\n"


def test_the_package_imports_no_command_line_and_no_optional_dependency() -> None:
    code = (
        "import sys, fusedres; heavy = {'fusedres.cli', 'fusedres.training', 'torchvision', 'triton', "
        "'matplotlib', 'sklearn', 'PIL'}; print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "COMMAND"),
        (("swim",), "swim"),
        (("bench", "--model", "resnet51"), "resnet51"),
        (("bench", "--batch", "-1"), "at least 1, got '-1'"),
        (("bench", "--rounds", "many"), "at least 1, got 'many'"),
        (("bench", "--image-size", "16"), "at least 32, got '16'"),
        (("bench", "--dtype", "int8"), "int8"),
        (("bench", "--train", "--inference"), "not allowed with"),
        (("bench", "--train", "--batch", "1", "--image-size", "32"), "more than one value per channel"),
        (("bench", "--train", "--peers"), "--peers measures inference"),
        (("bench", "--json", "no/such/folder/out.json"), "there is no directory"),
        (("bench", "--plot", "no/such/folder/out.png"), "there is no directory"),
        (("bench", "--json", "."), "is a directory"),
        (("train", "--lr", "0"), "above 0, got '0'"),
        (("train", "--lr", "nan"), "above 0, got 'nan'"),
        (("predict",), "IMAGE"),
        (("predict", "image.png"), "--checkpoint --weights"),
        (("predict", "image.png", "--checkpoint", "a", "--weights", "b"), "not allowed with"),
    ],
)
def test_a_bad_command_line_is_one_line_and_status_2(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = fails(capsys, *argv)
    assert status == 2
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("argv", [("bench",), ("predict", "image.png", "--weights", "DEFAULT")])
def test_cuda_without_a_gpu(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(capsys, *argv, "--device", "cuda")
    assert status == 2
    assert "--device cuda: " in line


def test_an_unknown_backend_in_the_environment() -> None:
    done = process("info", FUSEDRES_BACKEND="bogus")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "fusedres: error: FUSEDRES_BACKEND must be one of auto, triton, cuda, cpu, reference, got 'bogus'\n"
    )


def test_a_backend_that_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with fusedres.backend("cuda"):
        status, line = fails(capsys, "bench", "--device", "cpu")
    assert status == 1
    assert "backend 'cuda' can't serve bn_stats on cpu" in line


@needs("sklearn")
def test_an_interrupt_ends_without_a_traceback() -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "fusedres", "train", "--epochs", "1000", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores interrupts, and so does what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    running.stdout.readline()  # printed, through a pipe, with the first epoch's line or before
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    try:
        err = running.communicate(timeout=60)[1]
    finally:
        running.kill()
    assert running.returncode == 130
    assert err == "fusedres: interrupted\n"


# info


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert all(op in out for op in plan.ALL_OPS)


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fusedres"] == fusedres.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert isinstance(facts["compiled_module"]["loads"], bool)
    on_cpu = [entry for entry in facts["ops"] if entry["device"] == "cpu"]
    assert [entry["op"] for entry in on_cpu] == list(plan.ALL_OPS)
    for entry in on_cpu:
        for choice in entry["dtypes"].values():
            assert choice["implementation"] in (*plan.IMPLEMENTATIONS, "aten")
            assert choice["reason"]


def test_info_has_what_a_bug_report_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n")
    monkeypatch.setattr(machine, "_DRIVER", version)
    monkeypatch.setattr(kernels, "unavailable", lambda: {"triton": "triton is not installed"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("UNRELATED", "secret")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    packages = {"fusedres", "python", "torch", "torchvision", "timm", "triton", "numpy", "pillow"}
    assert facts["versions"].keys() == packages | {"cuda", "cudnn", "driver"}
    assert facts["versions"]["driver"] == "580.82.07"
    assert facts["platform"]
    assert facts["unavailable"] == {"triton": "triton is not installed"}
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "0" and "UNRELATED" not in facts["environment"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "580.82.07" in out and "unavailable: triton is not installed" in out and "secret" not in out


@pytest.mark.skipif("cpu" in kernels.unavailable(), reason="the compiled module is not built")
def test_info_has_how_the_compiled_module_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    module = json.loads(capsys.readouterr().out)["compiled_module"]
    assert module["build"].keys() == {"compiler", "nvcc", "openmp", "type"}
    assert module["build"]["compiler"] and bool(module["build"]["nvcc"]) == bool(module["cuda_archs"])
    assert main(["info"]) == 0
    assert f"by {module['build']['compiler']}" in capsys.readouterr().out


def test_info_shows_a_backend_that_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with fusedres.backend("cuda"):
        assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    choice = facts["ops"][0]["dtypes"]["fp32"]
    assert facts["backend"] == "cuda"
    assert choice["implementation"] == "none"
    assert "can't serve" in choice["reason"]


# predict


def test_predict_prints_the_models_own_probabilities(
    checkpoint: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing {index}\n" for index in range(CLASSES)))
    common = ["predict", str(image), "--model", "resnet18", "--checkpoint", str(checkpoint)]
    assert main([*common, "--labels", str(labels), "--top", "3", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["image"] == str(image)

    from fusedres.cli.images import preprocess

    model = fusedres.ResNet18(num_classes=CLASSES)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    with torch.no_grad():
        expected = model.eval()(preprocess(image))[0].softmax(0).topk(3)
    assert [entry["class"] for entry in result["predictions"]] == expected.indices.tolist()
    got = [entry["probability"] for entry in result["predictions"]]
    assert got == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert [entry["label"] for entry in result["predictions"]] == [
        f"thing {index}" for index in expected.indices.tolist()
    ]

    assert main(common) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)
    assert len(lines) == 1 + 5
    assert lines[1].endswith(f"class {expected.indices[0]}")


def test_predict_optimises_its_model(
    checkpoint: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    optimise = fusedres.optimize_for_inference

    def spy(model: torch.nn.Module) -> torch.nn.Module:
        seen.append(optimise(model))
        seen[-1].register_forward_hook(lambda *call: seen.append(call[0]))
        return seen[-1]

    monkeypatch.setattr(fusedres, "optimize_for_inference", spy)
    argv = ["predict", str(image), str(image), "--model", "resnet18", "--checkpoint", str(checkpoint)]
    assert main(argv) == 0
    # made once, called for each image
    assert len(seen) == 3 and seen[0] is seen[1] is seen[2]


@needs("torchvision")
@pytest.mark.parametrize("size", [(300, 260), (100, 90), (640, 231), (224, 224)])
def test_preprocessing_is_torchvisions(size: tuple[int, int], tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    from torchvision.models import ResNet50_Weights

    from fusedres.cli.images import preprocess

    path = tmp_path / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    expected = ResNet50_Weights.IMAGENET1K_V1.transforms()(Image.open(path))[None]
    torch.testing.assert_close(preprocess(path), expected, rtol=0, atol=1e-5)


@needs("torchvision")
@pytest.mark.parametrize("wrap", ["state_dict", "model"])
def test_predict_names_imagenet_classes_and_unwraps_checkpoints(
    wrap: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"module.{name}": value for name, value in fusedres.ResNet18().state_dict().items()}
    weights["module.fc.bias"][281] = 100.0
    torch.save({wrap: weights, "epoch": 3}, tmp_path / "net.pt")
    argv = ["predict", str(image), "--model", "resnet18", "--checkpoint", str(tmp_path / "net.pt")]
    assert main([*argv, "--top", "1"]) == 0
    assert "100.00%  tabby" in capsys.readouterr().out


def test_predict_reports_bad_images_and_predicts_the_good_one(
    checkpoint: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, text = tmp_path / "damaged.png", tmp_path / "text.png"
    damaged.write_bytes(image.read_bytes()[:1000])
    text.write_text("no image")
    paths = [str(path) for path in (tmp_path / "missing.png", image, damaged, text)]
    argv = ["predict", *paths, "--model", "resnet18", "--checkpoint", str(checkpoint), "--json"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert [result["image"] for result in results] == paths
    assert ["error" in result for result in results] == [True, False, True, True]
    assert err.count("fusedres: error: ") == err.count("\n") == 3
    assert "there is no image" in err and "is no image that can be read" in err


def test_predict_refuses_bad_checkpoints(
    checkpoint: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, model: str = "resnet18") -> str:
        return fails(capsys, "predict", image, "--model", model, "--checkpoint", path)[1]

    assert "there is no checkpoint" in refused(tmp_path / "missing.pt")
    assert "has no weights for resnet50" in refused(checkpoint, "resnet50")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    assert "is no checkpoint that torch.load reads" in refused(damaged)
    code = tmp_path / "code.pt"
    torch.save(fusedres.ResNet18(num_classes=2), code)  # a pickled module runs code when it is loaded
    assert "is no checkpoint that torch.load reads" in refused(code)
    for content in ([1, 2], {"a": 1}, {"fc.weight": torch.ones(3)}, {"fc.weight": torch.ones(3, 512)}):
        torch.save(content, damaged)
        assert str(damaged) in refused(damaged)


def test_predict_refuses_labels_that_do_not_fit(
    checkpoint: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("predict", image, "--model", "resnet18", "--checkpoint", checkpoint, "--labels")
    labels = tmp_path / "labels.txt"
    assert "can't read --labels" in fails(capsys, *argv, labels)[1]
    labels.write_text("one\ntwo\n")
    assert f"must have {CLASSES} lines, one a class, got 2" in fails(capsys, *argv, labels)[1]


@needs("torchvision")
def test_predict_refuses_unknown_weights(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(capsys, "predict", image, "--weights", "IMAGENET22K")
    assert status == 2
    assert "IMAGENET22K" in line
