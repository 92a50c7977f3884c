"""``fusedres experiment``: nets that are compared, gone on with, and set beside the paper's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from cifar_data import WEIGHTS

import fusedres
from fusedres.cli import main
from fusedres.cli.experiment import comparison, responses, series
from fusedres.cli.experiment.paper import CIFAR, IMAGENET_10_CROP
from fusedres.training import checkpoint, recipe
from fusedres.training.data import open_data
from fusedres.training.run import Run

numpy = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

SMALL = ("augmentation.crop=8", "augmentation.pad=1", "validation=0", "batch=8")
EXPERIMENTS = {experiment.name: experiment for experiment in comparison.EXPERIMENTS}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 32), ("test", 12)):
        labels = numpy.arange(count) % 3
        pixels = generator.integers(0, 120, (count, 8, 8, 3)) + 60 * labels[:, None, None, None]
        numpy.savez(folder / f"{part}.npz", images=pixels.astype(numpy.uint8), labels=labels)
    return folder


def command(name: str, images: Path, out: Path, *others: str) -> list[str]:
    settings = [f"--set={change}" for change in SMALL]
    return ["experiment", name, "--data", str(images), "--out", str(out), "--threads=1", *settings, *others]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_degradation(images, tmp_path, capsys):
    out = tmp_path / "out"
    nets = ["plain8", "plain14", "resnet8", "resnet14"]
    assert main(command("degradation", images, out, "--epochs=2", "--nets", *nets)) == 0
    said = capsys.readouterr().out
    found = rows(out)
    assert [(row["net"], row["number"]) for row in found] == [(net, n) for net in nets for n in "12"]
    assert [row["iteration"] for row in found[:2]] == ["4", "8"]
    for net in nets:
        state = checkpoint.load(out / net / "last.pt")
        run = Run.from_state_dict(state["run"])
        assert (run.recipe.model, run.recipe.epochs, run.recipe.batch) == (net, 2, 8)
        assert run.recipe.schedule.at == (4, 6)  # of 64,000 iterations, in 8
        last = next(row for row in reversed(found) if row["net"] == net)
        assert float(last["test_error"]) == state["history"][-1]["test_error"]
        assert f"{float(last['test_error']):.2%}" in said
        # the same but for the shortcut
        assert (out / net / "model.safetensors").exists()
    result = json.loads((out / "result.json").read_text())
    assert result["nets"]["plain14"]["iteration"] == 8 and result["settings"]["epochs"] == 2
    from PIL import Image

    width, height = Image.open(out / "curves.png").size
    assert width > 2 * height  # a panel for each kind


def test_the_same_command_goes_on(images, tmp_path, capsys):
    """A run that is there is not run again; one that was stopped ends as it would have."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("--epochs=2", "--nets", "plain8", "resnet8")
    assert main(command("degradation", images, whole, *arguments)) == 0
    run = Run.from_state_dict(checkpoint.load(whole / "resnet8" / "last.pt")["run"])
    data = open_data(str(images), run.recipe, 0, torch.device("cpu"))
    trainer = series.Trainer(run, data, torch.device("cpu"))
    for step, _ in enumerate(trainer, 1):
        if step == 5:
            break
    (out / "resnet8").mkdir(parents=True)
    checkpoint.save(out / "resnet8" / "last.pt", trainer.state_dict())
    capsys.readouterr()
    assert main(command("degradation", images, out, *arguments)) == 0
    assert "(from " in capsys.readouterr().out
    assert (out / "resnet8/model.safetensors").read_bytes() == (
        whole / "resnet8/model.safetensors"
    ).read_bytes()
    written = (out / "resnet8/last.pt").stat().st_mtime_ns
    assert main(command("degradation", images, out, *arguments)) == 0
    assert (out / "resnet8/last.pt").stat().st_mtime_ns == written
    assert main(command("degradation", images, out, "--epochs=3", "--nets", "resnet8")) == 1
    assert "has a run of other settings: choose another --out" in capsys.readouterr().err


def test_shortcuts(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command("shortcuts", images, out, "--epochs=1", "--nets", "resnet8")) == 0
    assert "A 25.03%, B 24.52%, C 24.19% (table 3)" in capsys.readouterr().out
    sizes = {}
    for shortcut in "ABC":
        state = checkpoint.load(out / f"resnet8 {shortcut}" / "last.pt")["model"]
        sizes[shortcut] = sum(".downsample.0.weight" in name for name in state)
    assert sizes == {"A": 0, "B": 2, "C": 3}


def test_depth_beside_the_paper(images, tmp_path, capsys):
    assert (
        main(command("depth", images, tmp_path / "out", "--epochs=1", "--nets", "resnet8", "resnet20")) == 0
    )
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("resnet20  ") and "epoch " not in line
    )
    assert "8.75%" in line and "table 6" in line


def test_budget(images, tmp_path, capsys):
    """As many epochs as the measured speeds allow."""
    out = tmp_path / "out"
    assert main(command("depth", images, out, "--budget=0.02", "--nets", "resnet8")) == 0
    said = capsys.readouterr().out
    assert "img/s in training" in said
    epochs = int(said.split(" epochs of all in 0.02 minutes")[0].splitlines()[-1])
    assert epochs >= 1 and len(rows(out)) == epochs
    # and stays with them
    assert main(command("depth", images, out, "--budget=5", "--nets", "resnet8")) == 0
    assert len(rows(out)) == epochs


def test_epochs_fit_the_budget(monkeypatch):
    speeds = {"a": (100.0, 200.0), "b": (50.0, 100.0)}

    class Data:
        train, test, validation = range(1000), range(100), None

    of = series.Series([], {}, "", Path(), None, 123.0, 0, "fp32", torch.device("cpu"))
    monkeypatch.setattr(series, "images_per_second", lambda run, data, device: speeds[run])
    # an epoch takes 10 + 0.5 and 20 + 1 seconds
    assert of._within_budget({"a": "a", "b": "b"}, Data, lambda line: None) == 3


def test_imagenets_residual_nets_have_the_plain_nets_parameters():
    entries = comparison._plain_and_residual(["plain34", "resnet34", "resnet56"])
    assert [entry.shortcut for entry in entries] == [None, "A", None]


def test_the_papers_figures():
    """Tables 2, 3 and 6 of He et al. 2015."""
    assert {name: theirs.error for name, theirs in CIFAR.items()} == {
        "resnet20": 8.75,
        "resnet32": 7.51,
        "resnet44": 7.17,
        "resnet56": 6.97,
        "resnet110": 6.43,
        "resnet1202": 7.93,
    }
    assert [IMAGENET_10_CROP[net].error for net in ("plain18", "plain34", "resnet18", "resnet34")] == [
        27.94,
        28.54,
        27.88,
        25.03,
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nets_that_experiments_have_are_ones(name):
    for entry in EXPERIMENTS[name].entries(list(EXPERIMENTS[name].nets)):
        with torch.device("meta"):
            Run(recipe.load("cifar-paper", {"model": entry.model}), "", shortcut=entry.shortcut).net(
                10
            ).build()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--nets", "resnet9"), "invalid choice: 'resnet9'"),
        (("--epochs=0",), "at least 1, got '0'"),
        (("--budget=-1",), "above 0, got '-1'"),
        (("--recipe", "mine"), "the recipe must be one of"),
        (("--set=bach=3",), "unknown key bach, did you mean batch?"),
    ],
)
def test_bad_input(images, tmp_path, capsys, others, message):
    try:
        status = main(command("depth", images, tmp_path / "out", *others))
    except SystemExit as exit:
        status = int(exit.code or 0)
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1


def test_no_images(tmp_path, capsys):
    assert main(command("depth", tmp_path / "none", tmp_path / "out")) == 1
    assert "there is no folder" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert main(command("depth", tmp_path, file)) == 2
    assert "is no directory" in capsys.readouterr().err


# layer responses


@pytest.mark.parametrize("plain", [False, True])
def test_layer_responses(plain):
    """Of every batch norm, written out from the block's children."""
    torch.manual_seed(0)
    net = fusedres.CifarResNet(8, plain=plain).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    batches = [torch.randn(5, 3, 16, 16), torch.randn(3, 3, 16, 16)]
    expected = {}
    with torch.inference_mode():
        x = net.bn1(net.conv1(torch.cat(batches)))
        expected["bn1"] = x.std(correction=0)
        x = x.relu()
        for stage in ("layer1", "layer2", "layer3"):
            block = getattr(net, stage)[0]
            first = block.bn1(block.conv1(x))
            second = block.bn2(block.conv2(first.relu()))
            expected[f"{stage}.0.bn1"], expected[f"{stage}.0.bn2"] = (
                first.std(correction=0),
                second.std(correction=0),
            )
            x = net.get_submodule(stage)(x)
    found = responses.layer_responses(net, batches)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name
    assert not any(module._forward_hooks for module in net.modules())


def test_responses_of_trained_nets(data, tmp_path, capsys):
    """The deeper net's are smaller, as in figure 7."""
    out = tmp_path / "out"
    nets = [
        arg
        for depth in (20, 56)
        for arg in ("--model", f"resnet{depth}", "--checkpoint", data / WEIGHTS[depth])
    ]
    argv = ["experiment", "responses", *nets, "--data", data / "cifar10_test.npz", "--out", out]
    assert main(list(map(str, argv))) == 0
    mean = json.loads((out / "result.json").read_text())["mean"]
    assert mean["resnet20"] == pytest.approx(0.732, abs=2e-3)
    assert mean["resnet56"] == pytest.approx(0.454, abs=2e-3)
    assert "0.732" in capsys.readouterr().out
    with (out / "responses.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [sum(row["net"] == net for row in found) for net in mean] == [19, 55]
    assert (out / "responses.png").stat().st_size > 10_000
