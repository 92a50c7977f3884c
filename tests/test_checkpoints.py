"""What a checkpoint says of its net is honoured by every command, and what is none is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_cli import fails, needs
from test_inference import seasoned
from torch import Tensor

import fusedres
from fusedres.cli import checkpoints, main
from fusedres.cli.errors import CommandError
from fusedres.cli.views import CIFAR, IMAGENET, Format
from fusedres.models import build
from fusedres.training.normalise import IMAGENET as IMAGENET_PIXELS
from fusedres.training.normalise import Normalisation

CLASSES = 6
SIZE = 24
Content = dict[str, Any]


def own(name: str = "resnet8", **facts: Any) -> Content:
    """A checkpoint as this package's training writes it."""
    torch.manual_seed(0)
    facts = {
        "name": name,
        "shortcut": None,
        "zeros": "end",
        "variant": "v1.5",
        "num_classes": CLASSES,
    } | facts
    net = build.build(
        name, CLASSES, shortcut=facts["shortcut"], zeros=facts["zeros"], variant=facts["variant"]
    )
    normalisation = Normalisation(torch.rand(3, SIZE, SIZE), torch.rand(3, 1, 1) + 0.5)
    return {
        "model": seasoned(net).state_dict(),
        "net": facts,
        "normalisation": normalisation.state_dict(),
        "size": SIZE,
        "resize": None,
        "epoch": 3,
    }


def as_torch(content: Content, folder: Path) -> Path:
    torch.save(content, folder / "net.pt")
    return folder / "net.pt"


def as_safetensors(content: Content, folder: Path) -> Path:
    tensors = {**content["model"]}
    tensors |= {f"normalisation.{name}": t for name, t in content.get("normalisation", {}).items()}
    facts = {name: content[name] for name in ("net", "size", "resize") if name in content}
    metadata = {"format": "pt", "fusedres": json.dumps(facts)}
    safetensors.torch.save_file(tensors, folder / "net.safetensors", metadata)
    return folder / "net.safetensors"


@pytest.fixture(params=[as_torch, as_safetensors])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Content], Path]:
    return lambda content: request.param(content, tmp_path)


def load(path: Path, model: str | None = None, zeros: Any = None) -> checkpoints.Trained:
    return checkpoints.load(model, path, None, zeros)


def refused(path: Path, *given: Any) -> str:
    with pytest.raises(CommandError) as raised:
        load(path, *given)
    return str(raised.value)


# what is read


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("resnet8", {}),
        ("resnet14", {"zeros": "split"}),
        ("resnet8", {"shortcut": "C"}),
        ("plain8", {}),
        ("plain18", {}),
        ("resnet50", {"variant": "v1"}),
    ],
)
def test_the_net_is_the_checkpoints(name: str, facts: Content, save: Any) -> None:
    content = own(name, **facts)
    trained = load(save(content))
    facts = content["net"]
    expected = build.build(
        name, CLASSES, shortcut=facts["shortcut"], zeros=facts["zeros"], variant=facts["variant"]
    )
    expected.load_state_dict(content["model"])
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(trained.net(x), expected.eval()(x))
    assert (trained.name, trained.classes, trained.format) == (name, CLASSES, Format(SIZE, None))
    assert trained.zeros == (facts["zeros"] if name in build.CIFAR else None)
    state = content["normalisation"]
    assert torch.equal(trained.normalisation.mean, state["mean"])
    assert torch.equal(trained.normalisation.std, state["std"])


def test_a_checkpoint_that_says_nothing(save: Any) -> None:
    trained = load(save({"model": own("resnet18")["model"]}), "resnet18")
    assert (trained.name, trained.format, trained.zeros) == ("resnet18", IMAGENET, None)
    assert trained.normalisation is IMAGENET_PIXELS
    trained = load(save({"model": own()["model"]}), "resnet8")
    assert (trained.name, trained.format, trained.zeros) == ("resnet8", CIFAR, "split")


def test_the_default_net(save: Any) -> None:
    assert load(save({"model": own("resnet50")["model"]})).name == "resnet50"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"size": 112}, Format(112, 128)),
        ({"size": 112, "resize": 120}, Format(112, 120)),
        ({"size": 112, "resize": None}, Format(112, None)),
        ({}, IMAGENET),
    ],
)
def test_sizes(facts: Content, expected: Format, save: Any) -> None:
    content = {name: own("resnet18")[name] for name in ("model", "net")}
    assert load(save(content | facts)).format == expected


def test_what_is_said_twice_must_be_the_same(save: Any) -> None:
    path = save(own())
    assert load(path, "resnet8", "end").zeros == "end"
    assert f"--model resnet14 is not what {path} has, resnet8" in refused(path, "resnet14")
    assert f"--zeros split is not what {path} has, end" in refused(path, None, "split")
    path = save(own("resnet18"))
    assert "--zeros is for CIFAR's nets" in refused(path, None, "end")


# every command


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def logits(content: Content, image: Path) -> Tensor:
    """[1, classes], of an image resized to the square."""
    from PIL import Image

    pixels = np.array(Image.open(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    state = content["normalisation"]
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - state["mean"]) / state["std"]
    net = fusedres.CifarResNet(8, zeros="end", num_classes=CLASSES).eval()
    net.load_state_dict(content["model"])
    with torch.no_grad(), fusedres.backend("reference"):
        return net(x)


def test_predict_reads_images_as_the_checkpoint_says(save: Any, image: Path, capsys: Any) -> None:
    content = own()
    assert main(["predict", str(image), "--checkpoint", str(save(content)), "--json", "--top", "1"]) == 0
    (found,) = json.loads(capsys.readouterr().out)[0]["predictions"]
    best = logits(content, image)[0].softmax(0).max(0)
    assert found["class"] == best.indices and found["probability"] == pytest.approx(
        best.values.item(), rel=1e-4
    )


def test_quantize_reads_images_as_the_checkpoint_says(save: Any, image: Path, tmp_path: Path) -> None:
    content = own()
    argv = ["quantize", "--checkpoint", save(content), "--calibration", image.parent, "--dtype", "fp32"]
    argv += [
        "--threads",
        "1",
        "--batch",
        "1",
        "--out",
        tmp_path / "net.pt2",
        "--json",
        tmp_path / "found.json",
    ]
    assert main([str(arg) for arg in argv]) == 0
    settings = json.loads((tmp_path / "found.json").read_text())["settings"]
    assert (settings["model"], settings["zeros"]) == ("resnet8", "end")
    size = torch.export.load(tmp_path / "net.pt2").example_inputs[0][0].shape
    assert size[1:] == (3, SIZE, SIZE)


def test_eval_reads_images_as_the_checkpoint_says(save: Any, image: Path, tmp_path: Path) -> None:
    content = own()
    truth = int(logits(content, image).argmax())
    for index in range(CLASSES):
        (tmp_path / "data" / str(index)).mkdir(parents=True)
    image.rename(tmp_path / "data" / str(truth) / "image.png")
    argv = [
        "eval",
        "--checkpoint",
        save(content),
        "--data",
        tmp_path / "data",
        "--json",
        tmp_path / "found.json",
    ]
    assert main([str(arg) for arg in argv]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["result"]["top1"]["correct"] == 1
    (member,) = found["members"]
    assert (member["model"], member["zeros"], member["size"]) == ("resnet8", "end", SIZE)
    assert member["mean"] == "per pixel"


# what is refused


def test_files_that_are_no_checkpoints(save: Any, tmp_path: Path, image: Path, capsys: Any) -> None:
    path = save(own())
    missing = path.with_stem("missing")
    assert refused(missing) == f"there is no checkpoint {missing}"
    whole = path.read_bytes()
    for size in (0, 7, 5000, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert f"{path} is no checkpoint that" in refused(path)
    path.write_bytes(b"\x00" * 1000)
    assert f"{path} is no checkpoint that" in refused(path)
    path.unlink()
    path.mkdir()
    for argv in (("predict", image), ("eval", "--data", tmp_path), ("quantize", "--calibration", tmp_path)):
        assert str(path) in fails(capsys, *argv, "--checkpoint", path)[1]


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(own()["model"], path, {"fusedres": "{'net': {'name': 'resnet8'}}"})
    assert "is no checkpoint that safetensors reads" in refused(path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"name": "resnet9"}, "is of a net that fusedres doesn't have, 'resnet9'"),
        ({"name": ["resnet8"]}, "is of a net that fusedres doesn't have"),
        ({"name": "resnet14"}, "has no weights for resnet14"),
        ({"num_classes": 9}, "is of a net of 9 classes, its weights of 6"),
        ({"zeros": "both"}, "zeros must be one of"),
        ({"shortcut": "D"}, "shortcut must be one of"),
        ({"shortcut": 3}, "shortcut must be one of"),
    ],
)
def test_nets_that_do_not_fit(facts: Content, said: str, save: Any) -> None:
    content = own()
    content["net"] |= facts
    assert said in refused(save(content))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"size": 0}, "size must be a whole number of at least 1, got 0"),
        ({"size": "24"}, "size must be a whole number of at least 1, got '24'"),
        ({"resize": 23}, "resize must be None or at least size, 24, got 23"),
        ({"resize": 32.5}, "resize must be None or at least size, 24, got 32.5"),
        ({"normalisation": {"mean": torch.zeros(3, 1, 1)}}, "must have a mean [C, H, W] and a std [C, 1, 1]"),
        (
            {"normalisation": {"mean": torch.zeros(1, 1, 1), "std": torch.ones(1, 1, 1)}},
            "must have 3 channels, finite, std above 0",
        ),
        (
            {"normalisation": {"mean": torch.zeros(3, 1, 1), "std": torch.zeros(3, 1, 1)}},
            "must have 3 channels, finite, std above 0",
        ),
        (
            {"normalisation": {"mean": torch.full((3, 1, 1), float("nan")), "std": torch.ones(3, 1, 1)}},
            "must have 3 channels, finite, std above 0",
        ),
    ],
)
def test_facts_that_do_not_fit(facts: Content, said: str, save: Any) -> None:
    assert said in refused(save(own() | facts))


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.bn1.running_mean", "fc.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(name: str, value: float, save: Any) -> None:
    content = own()
    content["model"][name].view(-1)[0] = value
    path = save(content)
    assert refused(path) == f"{path} has values that are not finite, in {name}"


def test_other_peoples_files(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    for content in ([1, 2], {"net": {"name": "resnet8"}}, {"model": {"conv1.weight": torch.ones(3)}}, "text"):
        torch.save(content, path)
        assert f"{path} has no state_dict of a ResNet" in refused(path)
    # a net of a name of theirs says nothing of ours
    torch.save({"model": own()["model"], "net": {"depth": 8}}, path)
    assert load(path, "resnet8").zeros == "split"


@needs("torchvision")
def test_torchvisions_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def resnet18(*, weights: str) -> Any:
        seen.append(weights)
        return fusedres.ResNet18()

    monkeypatch.setattr(fusedres, "resnet18", resnet18)
    trained = checkpoints.load("resnet18", None, "DEFAULT")
    assert seen == ["DEFAULT"] and not trained.net.training
    assert (trained.name, trained.source, trained.format) == ("resnet18", "DEFAULT", IMAGENET)
    with pytest.raises(CommandError, match="--zeros is for CIFAR's nets"):
        checkpoints.load("resnet18", None, "DEFAULT", "end")
