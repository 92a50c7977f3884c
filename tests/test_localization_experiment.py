"""The localization experiment: its canvases, that it learns, and what it writes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cifar_data import WEIGHTS
from torch import Tensor

import fusedres
from fusedres.cli import checkpoints, main
from fusedres.cli.experiment import canvases, localizing
from fusedres.cli.experiment.canvases import SIDES, SIZE
from fusedres.training.data.source import read_archives

np = pytest.importorskip("numpy")


def pictures(n: int = 12) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    return images, torch.arange(n) % 3


def test_objects_are_where_the_boxes_say():
    images, labels = pictures()
    images[:6], images[6:] = 0, 255  # black ones are pasted on white ones or black ones
    index = torch.arange(6)
    made = canvases.make(images, labels, index, torch.Generator().manual_seed(0))
    assert made.pixels.shape == (6, 3, SIZE, SIZE) and torch.equal(made.labels, labels[:6])
    sides = made.boxes[:, 2:] - made.boxes[:, :2]
    assert sides.min() >= SIDES[0] and sides.max() <= SIDES[1]
    assert made.boxes.min() >= 0 and made.boxes.max() <= SIZE
    on_white = 0
    for pixels, box in zip(made.pixels, made.boxes.int().tolist(), strict=True):
        x1, y1, x2, y2 = box
        assert pixels[:, y1:y2, x1:x2].max() == 0
        if pixels.max() > 0:
            on_white += 1
            assert (pixels > 0.99).sum() == 3 * (SIZE**2 - (x2 - x1) * (y2 - y1))
    assert on_white > 0


def test_canvases_are_those_of_the_seed():
    images, labels = pictures()
    index = torch.arange(12)
    one, same, other = (
        canvases.make(images, labels, index, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.boxes, same.boxes)
    assert not torch.equal(one.boxes, other.boxes)
    assert len({tuple(box) for box in one.boxes.tolist()}) == 12
    assert one.inputs.is_contiguous(memory_format=torch.channels_last)


def test_every_place_and_size_comes_up():
    images, labels = pictures(1)
    made = canvases.make(images, labels, torch.zeros(3000).long(), torch.Generator().manual_seed(0))
    sides = made.boxes[:, 2:] - made.boxes[:, :2]
    for axis in (0, 1):
        assert set(sides[:, axis].int().tolist()) == set(range(SIDES[0], SIDES[1] + 1))
        assert made.boxes[:, axis].min() == 0 and made.boxes[:, axis + 2].max() == SIZE


def test_errors_fall(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images of three classes, on a trained net, on canvases that it hasn't seen."""
    monkeypatch.setattr(canvases, "SIZE", 64)
    for part, name in (("train", "cifar10_train_first10k.npz"), ("test", "cifar10_test.npz")):
        (tmp_path / f"{part}.npz").symlink_to(data / name)
    train, others, _ = read_archives(tmp_path)
    three = [torch.nonzero(part.labels < 3).flatten() for part in (train, others)]
    train = train[three[0]]
    test = canvases.make(others.images, others.labels, three[1][:60], torch.Generator().manual_seed(1))
    trained = checkpoints.load("resnet20", data / WEIGHTS[20], None)
    model = localizing.make_model(trained.net, 3)
    records = list(
        localizing.train(model, train.images, train.labels, test, seconds=1e9, steps=60, batch=16, records=3)
    )
    first, last = records[0], records[-1]
    assert [record.step for record in records] == [0, 20, 40, 60]
    assert last.class_error < first.class_error - 0.2, records
    assert last.box_error < first.box_error - 0.2, records
    assert last.localization_error < first.localization_error - 0.2, records
    assert last.mean_iou > first.mean_iou
    assert last.loss_class < records[1].loss_class


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """The command on a few pictures."""
    for part in ("train", "test"):
        images, labels = pictures()
        np.savez(tmp_path / f"{part}.npz", images=images.numpy(), labels=labels.numpy())

    def run(**others: object) -> int:
        given = {"data": tmp_path, "out": tmp_path / "out", "batch": 2, "budget": 0.005} | others
        try:
            return main(["experiment", "localization", *(f"--{k}={v}" for k, v in given.items())])
        except SystemExit as exit:  # argparse's
            return int(exit.code or 0)

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run(run, tmp_path, capsys, precision):
    pytest.importorskip("matplotlib")
    assert run(model="resnet8", precision=precision) == 0
    out = capsys.readouterr().out
    assert "12 objects to train with, 12 canvases to test on" in out and "wrote" in out
    with (tmp_path / "out" / "localization.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2 and rows[0]["step"] == "0" and 0 <= float(rows[-1]["class_error"]) <= 1
    assert (tmp_path / "out" / "localization.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out" / "result.json").read_text())["result"]
    assert result["class_error"] == pytest.approx(float(rows[-1]["class_error"]), abs=1e-4)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_starts_from_a_trained_net(run, tmp_path, monkeypatch):
    """The checkpoint's own net, whatever its classes are."""
    pytest.importorskip("matplotlib")
    net = fusedres.CifarResNet(8, num_classes=7)
    facts = {"name": "resnet8", "num_classes": 7, "zeros": "end"}
    torch.save({"model": net.state_dict(), "net": facts}, tmp_path / "net.pt")
    started = []

    def train(model, *arguments, **settings):
        started.append(model.trunk.state_dict())
        yield localizing.Record(0, 0, 0, 0, 1, 1, 1, 0)

    monkeypatch.setattr(localizing, "train", train)
    assert run(checkpoint=tmp_path / "net.pt") == 0
    (found,) = started
    assert found and all(torch.equal(value, net.state_dict()[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"data": "none"}, "must have one *train*.npz, got none"),
        ({"checkpoint": "none.pt"}, "there is no checkpoint none.pt"),
        ({"model": "resnet9"}, "invalid choice: 'resnet9'"),
        ({"budget": 0}, "must be a number above 0, got '0'"),
        ({"out": "/dev/null/out"}, "is no directory"),
    ],
)
def test_run_says_what_is_wrong(run, capsys, others, message):
    pytest.importorskip("matplotlib")
    assert run(**others) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("fusedres: error: ") and message in err and err.count("\n") == 1
