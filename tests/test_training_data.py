"""Images to train on: which, in what order, augmented how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedres.training import recipe
from fusedres.training.data import DataError, Order, open_data
from fusedres.training.data.images import hold_out
from fusedres.training.data.pixels import pad_crop_flip
from fusedres.training.data.source import CIFAR10_CLASSES

numpy = pytest.importorskip("numpy")
CPU = torch.device("cpu")


def order(images: int, batch: int, epoch: int = 0, **others: Any) -> list[tuple[Tensor, Tensor]]:
    return list(Order(images, batch, 7, epoch, **others).batches())


def archive(path: Path, count: int, size: int = 8, classes: int = 3, **arrays: Any) -> None:
    generator = numpy.random.default_rng(count)
    content = {
        "images": generator.integers(0, 256, (count, size, size, 3), dtype=numpy.uint8),
        "labels": numpy.arange(count) % classes,
    }
    numpy.savez(path, **(content | arrays))


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    archive(tmp_path / "train.npz", 40)
    archive(tmp_path / "test.npz", 10)
    return tmp_path


def small(**changes: Any) -> recipe.Recipe:
    return recipe.load("cifar-paper", {"validation": 0, "augmentation.crop": 8} | changes)


# order


def test_an_epoch_sees_every_image_once_in_another_order_each_time():
    first, again, other = (torch.cat([i for i, _ in order(100, 10, epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_images_that_fill_no_batch_are_left_out():
    batches = order(25, 10)
    assert [len(index) for index, _ in batches] == [10, 10]
    assert len(torch.cat([index for index, _ in batches]).unique()) == 20


def test_goes_on_in_the_middle_of_an_epoch():
    whole, rest = order(100, 10), order(100, 10, first=6)
    assert len(rest) == 4
    for (index, seeds), (expected, expected_seeds) in zip(rest, whole[6:], strict=True):
        assert torch.equal(index, expected) and torch.equal(seeds, expected_seeds)


def test_processes_share_a_batch_with_the_same_augmentation():
    whole = order(100, 10)
    shares = [order(100, 10, rank=rank, processes=2) for rank in range(2)]
    for step, (index, seeds) in enumerate(whole):
        pairs = {*zip(index.tolist(), seeds.tolist(), strict=True)}
        own = [{*zip(*(t.tolist() for t in share[step]), strict=True)} for share in shares]
        assert own[0] | own[1] == pairs and len(own[0]) == len(own[1]) == 5


def test_hold_out():
    kept, held_out = hold_out(100, 30, 0)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(100))
    assert len(held_out) == 30 and not torch.equal(held_out, torch.arange(30))
    assert torch.equal(held_out, hold_out(100, 30, 0)[1]) and not torch.equal(
        held_out, hold_out(100, 30, 1)[1]
    )
    with pytest.raises(DataError, match="validation must be less than the 30 training images, got 30"):
        hold_out(30, 30, 0)


# augmentation


def test_pad_crop_flip_is_one_of_all_crops_of_the_padded_image():
    """Every crop and its mirror image, written out, and all of them drawn about as often."""
    image = torch.arange(1.0, 28.0).view(3, 3, 3)
    padded = torch.zeros(3, 5, 5)
    padded[:, 1:4, 1:4] = image
    crops = {}
    for top in range(3):
        for left in range(3):
            crop = padded[:, top : top + 3, left : left + 3]
            crops[top, left, False], crops[top, left, True] = crop, crop.flip(2)
    seeds = torch.randint(2**62, (1800,))
    out = pad_crop_flip(image.expand(1800, -1, -1, -1), 3, 1, True, seeds)
    counts = {key: int((out == crop).all((1, 2, 3)).sum()) for key, crop in crops.items()}
    assert sum(counts.values()) == 1800
    assert all(60 < count < 150 for count in counts.values()), counts
    unflipped = pad_crop_flip(image.expand(1800, -1, -1, -1), 3, 1, False, seeds)
    assert sum(int((unflipped == crops[key]).all((1, 2, 3)).sum()) for key in crops if not key[2]) == 1800


def test_an_images_augmentation_depends_on_its_own_seed():
    x, seeds = torch.rand(6, 3, 8, 8), torch.randint(2**62, (6,))
    whole = pad_crop_flip(x, 8, 2, True, seeds)
    assert torch.equal(pad_crop_flip(x[2:4], 8, 2, True, seeds[2:4]), whole[2:4])


# archives


def test_batches_are_the_images_normalised(archives):
    data = open_data(str(archives), small(**{"augmentation.pad": 0, "augmentation.flip": False}), 0, CPU)
    with numpy.load(archives / "train.npz") as content:
        pixels = torch.from_numpy(content["images"]).permute(0, 3, 1, 2).double() / 255
        labels = torch.from_numpy(content["labels"])
    seen = []
    for index, (x, y) in zip(
        (i for i, _ in Order(40, 10, 3, 0).batches()), data.train.batches(Order(40, 10, 3, 0)), strict=True
    ):
        torch.testing.assert_close(x.double(), pixels[index] - pixels.mean(0), atol=1e-6, rtol=0)
        assert torch.equal(y, labels[index]) and x.is_contiguous(memory_format=torch.channels_last)
        seen.append(x)
    # the mean image of all of them is nothing
    assert torch.cat(seen).mean(0).abs().max() < 1e-6
    assert (data.classes, data.size, data.resize) == (["0", "1", "2"], 8, None)


def test_per_channel_mean_and_deviation(archives):
    data = open_data(str(archives), small(**{"augmentation.mean": "per_channel"}), 0, CPU)
    x = torch.cat([x for x, _ in data.train.batches(Order(40, 40, 0, 0))])
    with numpy.load(archives / "train.npz") as content:
        pixels = torch.from_numpy(content["images"]).double() / 255
    torch.testing.assert_close(
        data.normalisation.mean.flatten().double(), pixels.mean((0, 1, 2)), rtol=1e-5, atol=0
    )
    expected = pixels.flatten(0, 2).std(0, correction=0)
    torch.testing.assert_close(data.normalisation.std.flatten().double(), expected, rtol=1e-4, atol=0)
    assert x.shape == (40, 3, 8, 8)


def test_held_out_images_are_not_trained_on(archives):
    data = open_data(str(archives), small(validation=15), 0, CPU)
    assert data.validation is not None and (len(data.train), len(data.validation)) == (25, 15)
    with numpy.load(archives / "train.npz") as content:
        pixels = torch.from_numpy(content["images"]).permute(0, 3, 1, 2).float() / 255
    kept, held_out = hold_out(40, 15, 0)
    mean = pixels[kept].mean(0)
    torch.testing.assert_close(data.normalisation.mean, mean)
    x = torch.cat([x for x, _ in data.validation.batches(4, 0, 1)])
    torch.testing.assert_close(x, pixels[held_out] - mean)


def test_testing_is_shared_out(archives):
    data = open_data(str(archives), small(), 0, CPU)
    labels = [torch.cat([y for _, y in data.test.batches(3, rank, 2)]) for rank in range(2)]
    assert torch.equal(torch.stack(labels, 1).flatten(), torch.arange(10) % 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": numpy.zeros((40, 8, 8, 3))},
            r"must be uint8 \[N, H, W, 3\], got float64 \[40, 8, 8, 3\]",
        ),
        ({"images": numpy.zeros((0, 8, 8, 3), numpy.uint8)}, r"must be uint8 .* got uint8 \[0, 8, 8, 3\]"),
        ({"labels": numpy.zeros(39, int)}, r"labels of .* must be integers \[40\], got int64 \[39\]"),
        ({"labels": numpy.full(40, -1)}, "labels of .* must not be negative, got -1"),
        ({"labels": numpy.zeros(40, int)}, "labels to test on must be from 0 to 0, .* got 2"),
    ],
)
def test_archives_that_are_wrong(archives, arrays, message):
    archive(archives / "train.npz", 40, **arrays)
    with pytest.raises(DataError, match=message):
        open_data(str(archives), small(), 0, CPU)


def test_archives_that_are_missing_or_damaged(archives):
    content = (archives / "train.npz").read_bytes()
    (archives / "train.npz").write_bytes(content[:100])
    with pytest.raises(DataError, match="train.npz can't be read"):
        open_data(str(archives), small(), 0, CPU)
    numpy.savez(archives / "train.npz", labels=numpy.zeros(4))
    with pytest.raises(DataError, match="train.npz can't be read: no array .*images"):
        open_data(str(archives), small(), 0, CPU)
    (archives / "train.npz").unlink()
    with pytest.raises(DataError, match=r"must have one \*train\*.npz, got none"):
        open_data(str(archives), small(), 0, CPU)


def test_what_small_images_do_not_have(archives):
    with pytest.raises(DataError, match="augmentation.colour is for folders of images"):
        open_data(str(archives), small(**{"augmentation.colour": 0.1}), 0, CPU)
    with pytest.raises(DataError, match="augmentation.crop must be at most 16 .* got 32"):
        open_data(str(archives), small(**{"augmentation.crop": 32}), 0, CPU)


def test_no_data(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*none; the data must be digits or a folder"):
        open_data(str(tmp_path / "none"), small(), 0, CPU)
    with pytest.raises(DataError, match="must be a folder with one"):
        open_data(str(tmp_path), small(), 0, CPU)


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = open_data("digits", recipe.load("digits"), 0, CPU)
    assert (len(data.train), len(data.test), data.size) == (1437, 360, 16)
    (x, labels), *_ = data.test.batches(360, 0, 1)
    # the corners of a resized image lie within its first and last pixel: find each by its labels' images
    grey = torch.from_numpy(datasets.load_digits().images).float()
    resized = torch.nn.functional.interpolate(grey[:, None], size=16, mode="bilinear")[:, 0] / 16
    back = x[:, 0] * data.normalisation.std[0] + data.normalisation.mean[0]
    nearest = (back[:20, None] - resized[None]).abs().amax((2, 3))
    assert nearest.min(1).values.max() <= 0.5 / 255 + 1e-5
    targets = torch.from_numpy(datasets.load_digits().target)
    assert torch.equal(targets[nearest.argmin(1)], labels[:20])
    assert torch.equal(x[:, 0], x[:, 2])


# torchvision's CIFAR


def test_torchvisions_cifar(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    rows = {}
    for name in names:
        rows[name] = generator.integers(0, 256, (4, 3072), dtype=numpy.uint8)
        content = {"data": rows[name], "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": CIFAR10_CLASSES}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    # the sums that torchvision compares are those of the real files
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *a: True)
    for path in (tmp_path, folder):
        data = open_data(str(path), small(**{"augmentation.crop": 32}), 0, CPU)
        assert (len(data.train), len(data.test), data.classes[9]) == (20, 4, "truck")
        (x, labels), *_ = data.test.batches(4, 0, 1)
        expected = torch.from_numpy(rows["test_batch"]).view(4, 3, 32, 32).float() / 255
        torch.testing.assert_close(x + data.normalisation.mean, expected)
        assert labels.tolist() == [0, 1, 2, 9]


def test_torchvisions_cifar_is_checked(tmp_path):
    pytest.importorskip("torchvision.datasets")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="can't be read: Dataset not found or corrupted"):
        open_data(str(tmp_path), small(), 0, CPU)
