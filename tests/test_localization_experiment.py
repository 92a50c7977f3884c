"""The localization experiment: its canvases, that it learns, and what it writes."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

np = pytest.importorskip("numpy")

from fusedres.experiments import canvases, localization  # noqa: E402
from fusedres.experiments.canvases import SIDES, SIZE  # noqa: E402


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


def test_errors_fall(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images of three classes, on a trained net, on canvases that it hasn't seen."""
    monkeypatch.setattr(canvases, "SIZE", 64)
    images, labels = localization.read(data / "cifar10_train_first10k.npz")
    others, their_labels = localization.read(data / "cifar10_test.npz")
    three = [torch.nonzero(every < 3).flatten() for every in (labels, their_labels)]
    test = canvases.make(others, their_labels, three[1][:60], torch.Generator().manual_seed(1))
    images, labels = images[three[0]], labels[three[0]]
    net = localization.load_net(data / "resnet20-12fca82f.th", 20)
    model = localization.make_model(net, 3)
    records = list(
        localization.train(model, images, labels, test, seconds=1e9, steps=60, batch=16, records=3)
    )
    first, last = records[0], records[-1]
    assert [record.step for record in records] == [0, 20, 40, 60]
    assert last.class_error < first.class_error - 0.2, records
    assert last.box_error < first.box_error - 0.2, records
    assert last.localization_error < first.localization_error - 0.2, records
    assert last.mean_iou > first.mean_iou
    assert last.loss_class < records[1].loss_class


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def run(tmp_path: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    localization.add_arguments(parser)
    images, labels = pictures()
    data = save(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    fixed = ["--data", str(data), "--out", str(tmp_path / "out"), "--depth", "8", "--batch", "2"]
    return localization.run(parser.parse_args([*fixed, *options]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_run(tmp_path, capsys, dtype):
    pytest.importorskip("matplotlib")
    assert run(tmp_path, "--budget", "0.005", "--dtype", dtype) == 0
    out = capsys.readouterr().out
    assert "11 objects to train with, 1 canvases to test on" in out and "wrote" in out
    with (tmp_path / "out" / "localization.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2 and rows[0]["step"] == "0" and 0 <= float(rows[-1]["class_error"]) <= 1
    assert (tmp_path / "out" / "localization.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["localization.csv", "localization.png"]


def test_run_says_what_is_wrong(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    images, labels = (part.numpy() for part in pictures())
    bad = {
        "--test none.npz": "No such file",
        f"--test {save(tmp_path / 'a.npz', images=images)}": "must have arrays images and labels, got images",
        f"--test {save(tmp_path / 'b.npz', images=labels, labels=labels)}": "must have images [N, h, w, 3]",
        f"--checkpoint {save(tmp_path / 'c.npz', images=images)}": "has no weights of a ResNet-8",
        "--checkpoint none.pt": "No such file",
        "--depth 9": "depth must be 6n+2",
        "--budget 0": "--budget must be positive, got 0.0",
    }
    for options, message in bad.items():
        assert run(tmp_path, *options.split()) == 1
        err = capsys.readouterr().err
        assert err.startswith("fusedres: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_nets_from_files(tmp_path, key):
    net = localization.CifarResNet(14, num_classes=7)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    path = tmp_path / "net.pt"
    torch.save(
        {key: state, "net": {"zeros": "end"}} if key == "model" else {key: state} if key else state, path
    )
    with pytest.raises(ValueError, match="net.pt has no weights of a ResNet-20: .* must have"):
        localization.load_net(path, 20)
    with pytest.raises(ValueError, match="net.pt has no weights of a ResNet-8: "):
        localization.load_net(path, 8)
    found = localization.load_net(path, 14)
    assert found.layer2[0].downsample.padding == ((0, 16) if key == "model" else (8, 8))
    model = localization.make_model(found, 3)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.trunk.state_dict().items())
