"""Folders of image files to train on: ImageNet's recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from folder_data import CLASSES, CPU, batches, opened, write_pictures

from fusedres.training.data import DataError, views
from fusedres.training.data.by_torchvision import FileDataset
from fusedres.training.data.reading import Files, Reading
from fusedres.training.normalise import Normalisation
from fusedres.training.recipe import Augmentation

numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms.v2")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path, ".png")


def test_classes_and_shapes(images):
    data = opened(images)
    assert (data.classes, len(data.train), len(data.test)) == ([*CLASSES], 12, 6)
    assert (data.size, data.resize) == (32, 36)
    found = batches(data)
    assert len(found) == 3
    for x, labels in found:
        assert x.shape == (4, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
    assert torch.cat([labels for _, labels in found]).bincount().tolist() == [4, 4, 4]


def test_test_images_are_the_crop_in_the_centre(images):
    """Written out with Pillow's filter, which torchvision's agrees with to a step or two of 255."""
    data = opened(images, mean="imagenet")
    (x, labels), *_ = data.test.batches(6, 0, 1)
    for index, name in enumerate(name for name in CLASSES for _ in range(2)):
        picture = Image.open(images / "val" / name / f"{index % 2}.png")
        width, height = picture.size
        resized = picture.resize((int(36 * width / height), 36), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 32) / 2), 2
        pixels = numpy.array(resized.crop((left, top, left + 32, top + 32)), dtype=numpy.float32) / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        difference = (x[index] - torch.from_numpy(expected).permute(2, 0, 1)).abs()
        assert difference.max() < 3 / 255 / 0.22, name
        assert labels[index] == CLASSES.index(name)


def test_the_same_images_whoever_reads_them(images):
    alone, others = batches(opened(images)), batches(opened(images, readers=2))
    for (x, labels), (expected, expected_labels) in zip(others, alone, strict=True):
        assert torch.equal(x, expected) and torch.equal(labels, expected_labels)


def test_every_epoch_draws_anew_and_goes_on_in_the_middle(images):
    data = opened(images)
    first, second = batches(data, 0), batches(data, 1)
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert torch.equal(batches(data, 1, first=2)[0][0], second[2][0])
    # and leaves the random numbers of the program alone
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    batches(data)
    assert torch.equal(torch.rand(2), expected)


def test_crops_have_the_scales_of_the_recipe(tmp_path):
    """A ramp whose slope tells the scale that it was resized by."""
    ramp = numpy.broadcast_to(numpy.arange(240, dtype=numpy.uint8)[:, None], (120, 240, 3))
    Image.fromarray(numpy.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    view = views.training(Augmentation(crop=32, shorter=(40, 60)))
    dataset = FileDataset(Reading(Files([tmp_path / "ramp.png"], [0]), view, 32, CPU, 0))
    scales = []
    for seed in range(200):
        row = dataset[0, seed].pixels[0, 16].float()
        assert row.shape == (32,)
        scales.append(float(120 * (row[-4] - row[3]) / 25))  # 120 px became that many
    shorter = sorted(120 * 120 / s for s in scales)
    assert 39 < shorter[0] < 42 and 58 < shorter[-1] < 61.5
    assert len({round(s) for s in shorter}) > 15


@pytest.mark.parametrize(
    ("augmentation", "steps"),
    [
        (
            {"shorter": (40, 64)},
            [transforms.RandomShortestSize(list(range(40, 65))), transforms.RandomCrop(32)],
        ),
        ({"pad": 4}, [transforms.RandomShortestSize(32), transforms.Pad(4), transforms.RandomCrop(32)]),
        ({"area": (0.08, 1.0)}, [transforms.RandomResizedCrop(32)]),
        ({"area": (1.0, 1.0)}, [transforms.RandomResizedCrop(32, scale=(1.0, 1.0))]),  # which never fits
    ],
    ids=str,
)
def test_draws_as_torchvision_does(tmp_path, augmentation, steps):
    """To the bit, by the same seed. The sides are powers of 2, as RandomShortestSize rounds others down."""
    noise = torch.randint(256, (3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    view = views.training(Augmentation(crop=32, flip=True, **augmentation))
    dataset = FileDataset(Reading(Files([tmp_path / "noise.png"], [0]), view, 32, CPU, 0))
    transform = transforms.Compose([*steps, transforms.RandomHorizontalFlip()])
    for seed in range(40):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = transform(noise)
        assert torch.equal(dataset[0, seed].pixels, expected), seed


def test_colour_augmentation_moves_along_the_eigenvectors(images):
    plain, coloured = opened(images, colour=0.0, mean="imagenet"), opened(images, colour=0.1, mean="imagenet")
    shifts = []
    for (x, _), (y, _) in zip(batches(plain), batches(coloured), strict=True):
        difference = (y - x) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        shift = difference.mean((2, 3))
        torch.testing.assert_close(
            difference, shift[:, :, None, None].expand_as(difference), atol=1e-5, rtol=0
        )
        shifts.append(shift)
    along = torch.cat(shifts) @ views.EIGENVECTORS / views.EIGENVALUES  # of standard deviation 0.1
    assert 0.05 < along.std() < 0.2
    torch.testing.assert_close(views.EIGENVECTORS.T @ views.EIGENVECTORS, torch.eye(3), atol=2e-3, rtol=0)


def test_per_pixel_mean(images):
    data = opened(images)
    assert data.normalisation.mean.shape == (3, 32, 32)
    nothing = Normalisation(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    reading = dataclasses.replace(data.test.reading, files=data.train.reading.files)  # type: ignore[attr-defined]
    testing = type(data.test)(data.test.read, reading, nothing)  # type: ignore[attr-defined]
    (x, _), *_ = testing.batches(12, 0, 1)
    torch.testing.assert_close(data.normalisation.mean, x.mean(0))


def test_random_area(images):
    data = opened(images, shorter=None, area=[0.25, 1.0])
    assert batches(data)[0][0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("readers", [0, 2])
def test_a_damaged_image_is_named(images, readers):
    (images / "train" / "bee" / "2.png").write_bytes(b"no picture")
    data = opened(images, readers, mean="imagenet")
    with pytest.raises(DataError, match=r"bee/2.png is no image that can be read: cannot identify"):
        batches(data)


def test_folders_that_are_wrong(images):
    with pytest.raises(DataError, match="augmentation.crop must be given for folders of images"):
        opened(images, crop=None, shorter=None, test_shorter=None)
    (images / "val" / "cat").rename(images / "val" / "dog")
    with pytest.raises(DataError, match="val must have the classes of the training images, differs in cat"):
        opened(images)
    (images / "val").rename(images / "other")
    with pytest.raises(DataError, match="must have val/ or test/ beside train/"):
        opened(images)
    for path in (images / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="train has no images"):
        opened(images)
