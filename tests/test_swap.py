"""The swap in an existing training script: one line changes, everything else stays."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import named
from torch.utils.data import DataLoader, TensorDataset

import fusedres

LINE = "model = fusedres.ResNet18()  # was: torchvision.models.resnet18()\n"


def script(model: str) -> str:
    """The README's training script with either model."""
    found = named()["swap"]
    assert LINE in found
    return found.replace(LINE, f"model = {model}\n")


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 1000, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def run(model: str, **names: Any) -> tuple[Any, list[float]]:
    names = {"torch": torch, "loader": loader(), "losses": [], **names}
    exec(script(model), names)
    return names["model"], names["losses"]


def test_three_steps_of_a_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    torchvision = importlib.import_module("torchvision")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), "resnet18.pt")

    theirs, expected = run("torchvision.models.resnet18()", torchvision=torchvision)
    ours, losses = run("fusedres.ResNet18()", fusedres=fusedres)

    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-2)
    # and back: what was trained loads into torchvision's model, and predicts the same there
    torch.save(ours.state_dict(), "trained.pt")
    theirs.load_state_dict(torch.load("trained.pt", weights_only=True))
    images = next(iter(loader()))[0]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-3, atol=1e-4)


def test_an_op_and_a_trained_net() -> None:
    assert named().keys() == {"swap", "convert", "op", "detection", "inference"}
    names: dict[str, Any] = {}
    exec(named()["op"], names)
    assert names["z"].shape == names["x"].shape and names["bn"].running_mean.abs().sum() > 0

    names = {}
    exec(named()["inference"], names)
    with torch.no_grad():
        expected = names["model"](names["images"])
    for logits, allowed in ((names["logits"], 0.03), (names["logits_of_8_bits"], 0.15)):
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() <= allowed * expected.norm()


def test_the_snippet_that_converts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {}
    exec(named()["convert"], names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and all(line.endswith(": fused") for line in lines)
    assert not any(entry.fused for entry in fusedres.coverage(names["model"]))


def test_the_detector_of_the_docs_trains() -> None:
    pytest.importorskip("torchvision", exc_type=ImportError)
    names: dict[str, Any] = {}
    exec(named()["detection"], names)
    model = names["model"]
    assert set(names["losses"]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert len(names["found"]) == 2 and set(names["found"][0]) == {"boxes", "labels", "scores"}
