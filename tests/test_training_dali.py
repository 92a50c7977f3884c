"""Folders of image files read by NVIDIA DALI, here on the CPU; against the reader of torchvision."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_data import CLASSES, CPU, Batch, batches, opened, write_pictures

from fusedres.cli import main
from fusedres.training import checkpoint, recipe
from fusedres.training.data import Data, DataError, Order, by_dali, by_torchvision
from fusedres.training.data.reading import Files, Reading
from fusedres.training.data.views import View
from fusedres.training.run import Run

numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="needs DALI",
)

# Both decode to the same pixels. In resizing, torchvision's weights are whole numbers of 8 to 16 bits and
# DALI's come of a table: where the exact value is between two steps of 255, smooth pictures differ by one.
STEPS = 1
MEAN_STEPS = 0.5
GPU_STEPS = 8  # nvJPEG has another inverse DCT


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images", ".png", ".jpg")


def dali(folder: Path, readers: int = 2, **changes: Any) -> Data:
    return opened(folder, readers, "dali", **changes)


def close(x: torch.Tensor, expected: torch.Tensor, steps: int = STEPS) -> None:
    """Of pixels from 0 to 255."""
    difference = (x.float() - expected.float()).abs()
    assert difference.max() < steps + 0.01 and difference.mean() < MEAN_STEPS * steps


def same(found: list[Batch], expected: list[Batch]) -> None:
    for (x, labels), (y, others) in zip(found, expected, strict=True):
        assert torch.equal(x, y) and torch.equal(labels, others)


def command(images: Path, *others: object) -> list[str]:
    changes = ("augmentation.shorter=[36,60]", "augmentation.crop=32", "augmentation.test_shorter=36")
    argv = ["train", "--data", images, "--recipe", "imagenet-paper", "--model", "resnet8", "--batch", 4]
    argv += ["--threads", 1, "--readers", 1, *(f"--set={change}" for change in changes), *others]
    return [str(arg) for arg in argv]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(arg) for arg in argv]) != 0
    err = capsys.readouterr().err
    assert err.startswith("fusedres: error: ") and err.count("\n") == 1, err
    return err


@needs_dali
@pytest.mark.parametrize(
    "changes",
    [{}, {"shorter": None, "area": [0.1, 1.0]}, {"shorter": None, "pad": 4}, {"colour": 0.1}],
    ids=str,
)
def test_the_images_of_torchvision(images, changes):
    """Classes, order and labels, and pixels but for their rounding."""
    changes = {"mean": "imagenet"} | changes
    data, expected = dali(images, **changes), opened(images, **changes)
    assert (data.classes, data.size, data.resize) == ([*CLASSES], expected.size, expected.resize)
    assert (len(data.train), len(data.test)) == (12, 6)
    pairs = [
        *zip(batches(data), batches(expected), strict=True),
        *zip(data.test.batches(4, 0, 1), expected.test.batches(4, 0, 1), strict=True),
    ]
    assert [len(x) for (x, _), _ in pairs] == [4, 4, 4, 4, 2]
    std = data.normalisation.std
    for (x, labels), (y, others) in pairs:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 32, 32)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and torch.equal(labels, others)
        close(x * std * 255, y * std * 255)


@needs_dali
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", ".png"), ("RGBA", ".png"), ("RGB", ".jpg"), ("L", ".jpg"), ("CMYK", ".jpg"), ("RGB", ".webp")],
)
def test_views(images, mode, suffix):
    """Parts, sizes, corners outside and mirrors, each as torchvision makes it; no image is turned."""
    part, size = ((8, 5), (30, 41)), (36, 45)
    views = [
        View((0, 0), (48, 60), (48, 60), (0, 0)),
        View((0, 0), (48, 60), size, (3, 9)),
        View((0, 0), (48, 60), size, (3, 9), mirror=True),
        View((0, 0), (48, 60), size, (-4, 17), mirror=True),
        View(*part, (32, 32), (0, 0)),
        View(*part, (64, 64), (11, 0), mirror=True),
    ]
    path = images / f"picture{suffix}"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(images / "train" / "ant" / "0.png").convert(mode).save(path, exif=turned)
    reading = Reading(Files([path], [0]), lambda height, width, seed: views[seed], 32, CPU, 0)
    asked = [(0, seed) for seed in range(len(views))]
    ((found, _, _),) = by_dali.reader()(reading, iter([asked]))
    ((expected, _, _),) = by_torchvision.reader()(reading, iter([asked]))
    assert found.dtype == torch.uint8 and found.shape == (6, 3, 32, 32)
    close(found, expected)
    assert torch.equal(found[0], expected[0])  # not resized
    assert torch.equal(found[2], found[1].flip(2))
    assert found[3, :, :4].max() == 0 and found[3, :, 4:].amin((0, 1)).max() > 0


@needs_dali
def test_an_image_depends_on_its_seed_alone(images):
    """Not on the threads, the step that is begun with, or the processes that share a batch."""
    data = dali(images)
    first, second = batches(data, 0), batches(data, 1)
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    same(batches(data, 1), second)
    same(batches(data, 1, first=2), second[2:])
    for readers in (0, 3):
        same(batches(dali(images, readers), 1), second)
    shares = [batches(data, 1, rank=rank, processes=2) for rank in range(2)]
    for (x, labels), *halves in zip(second, *shares, strict=True):
        for rank, (half, own) in enumerate(halves):
            assert torch.equal(half, x[rank::2]) and torch.equal(own, labels[rank::2])
    whole = torch.cat([x for x, _ in data.test.batches(6, 0, 1)])
    shared = [torch.cat([x for x, _ in data.test.batches(2, rank, 2)]) for rank in range(2)]
    assert torch.equal(torch.stack(shared, 1).flatten(0, 1), whole)
    assert list(data.test.batches(2, 6, 7)) == []  # more processes than images


@needs_dali
@pytest.mark.gpu
def test_on_a_gpu(images):
    cuda = torch.device("cuda", 0)
    data, expected = dali(images, device=cuda, mean="imagenet"), dali(images, mean="imagenet")
    found = batches(data)
    same(batches(data), found)
    std = 255 * expected.normalisation.std
    for (x, labels), (y, others) in zip(found, batches(expected), strict=True):
        assert x.device == labels.device == cuda
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels.cpu(), others)
        close(x.cpu() * std, y * std, GPU_STEPS)


@needs_dali
def test_random_numbers_of_the_program_are_left_alone(images):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    batches(dali(images))
    assert torch.equal(torch.rand(2), expected)


@needs_dali
def test_given_up_in_the_middle(images):
    """As a run that is interrupted does; the next one begins anew."""
    data = dali(images)
    expected = batches(data)
    found = data.train.batches(Order(12, 4, 0, 0))
    next(found)
    found.close()
    same(batches(data), expected)


@needs_dali
@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [("2.png", 0, "cannot identify"), ("2.png", 2000, "truncated"), ("1.jpg", 900, "truncated")],
)
def test_a_damaged_image_is_named(images, name, length, reason):
    path = images / "train" / "bee" / name
    path.write_bytes(path.read_bytes()[:length] or b"no picture")
    data = dali(images, mean="imagenet")
    with pytest.raises(DataError, match=f"bee/{name} is no image that can be read: .*{reason}"):
        batches(data)


@needs_dali
def test_an_image_that_only_dali_refuses(images, monkeypatch):
    """Each image of the batch goes through DALI alone."""
    path = images / "train" / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:900])
    monkeypatch.setattr(by_dali, "picture", lambda path: None)
    with pytest.raises(DataError, match=r"bee/1.jpg is no image that DALI can read: Failed to decode"):
        batches(dali(images, mean="imagenet"))


@needs_dali
def test_train(images, tmp_path, capsys):
    """The loader is the run's: --resume keeps it."""
    out = tmp_path / "out"
    assert main(command(images, "--loader", "dali", "--epochs", 1, "--out", out)) == 0
    assert "12 training and 6 test images of 3 classes" in capsys.readouterr().out
    assert checkpoint.load(out / "last.pt")["run"]["loader"] == "dali"
    assert main(["train", "--resume", str(out)]) == 0
    capsys.readouterr()
    err = fails(capsys, "train", "--resume", out, "--loader", "torchvision")
    assert "--loader can't be given with --resume" in err


def test_without_dali(images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    err = fails(capsys, *command(images, "--loader", "dali"))
    assert "the loader dali needs nvidia-dali-cuda130: pip install nvidia-dali-cuda130" in err


def test_images_in_memory(tmp_path, capsys):
    for part in ("train", "test"):
        arrays = {"images": numpy.zeros((8, 8, 8, 3), numpy.uint8), "labels": numpy.zeros(8, numpy.int64)}
        numpy.savez(tmp_path / f"{part}.npz", **arrays)
    err = fails(capsys, *command(tmp_path, "--loader", "dali"))
    assert f"the loader dali is for folders of images, {tmp_path} is held in memory" in err


def test_runs_before_there_were_loaders():
    run = Run(recipe.load("imagenet-paper"), "images")
    state = run.state_dict()
    del state["loader"]
    assert Run.from_state_dict(state) == run and run.loader == "torchvision"
    other = dataclasses.replace(run, loader="dali")
    assert Run.from_state_dict(other.state_dict()) == other
