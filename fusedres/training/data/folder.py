"""Folders of image files with a subfolder for each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fusedres.training.data import views
from fusedres.training.data.images import Batches, Data, DataError, Order, hold_out
from fusedres.training.data.reading import Files, Indices, Loader, Reader, Reading, reader
from fusedres.training.normalise import Mean, Normalisation, measure
from fusedres.training.recipe import Recipe

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MEAN_OF = 10_000  # training images that a mean is computed of, at most


def _load(read: Reader, reading: Reading, normalise: Normalisation, indices: Indices) -> Batches:
    for pixels, shifts, labels in read(reading, indices):
        images = normalise(pixels.float() / 255 + shifts[:, :, None, None])
        yield images.contiguous(memory_format=torch.channels_last), labels


class TrainingFiles:
    """Files to train on; see :class:`fusedres.training.data.Training`."""

    def __init__(self, read: Reader, reading: Reading, normalise: Normalisation) -> None:
        self.read, self.reading, self.normalise = read, reading, normalise

    def __len__(self) -> int:
        return len(self.reading.files)

    def batches(self, order: Order) -> Batches:
        indices = (list(zip(index.tolist(), seeds.tolist(), strict=True)) for index, seeds in order.batches())
        return _load(self.read, self.reading, self.normalise, indices)


class TestingFiles:
    """Files to test on; see :class:`fusedres.training.data.Testing`."""

    def __init__(self, read: Reader, reading: Reading, normalise: Normalisation) -> None:
        self.read, self.reading, self.normalise = read, reading, normalise

    def __len__(self) -> int:
        return len(self.reading.files)

    def batches(self, size: int, rank: int, processes: int) -> Batches:
        own = torch.arange(rank, len(self), processes)
        indices = ([(index, 0) for index in part.tolist()] for part in torch.split(own, size) if len(part))
        return _load(self.read, self.reading, self.normalise, indices)


def _find(folder: Path, classes: list[str] | None = None) -> tuple[Files, list[str]]:
    try:
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if classes is not None and found != classes:
            missing = sorted({*classes} ^ {*found})
            raise DataError(f"{folder} must have the classes of the training images, differs in {missing[0]}")
        files = [
            (path, label)
            for label, name in enumerate(found)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
    except OSError as error:
        raise DataError(f"can't read {folder}: {error}") from error
    if not files:
        raise DataError(f"{folder} has no images ({' '.join(SUFFIXES)}) in subfolders, one for each class")
    return Files([path for path, _ in files], [label for _, label in files]), found


def _normalisation(read: Reader, reading: Reading, mean: Mean) -> Normalisation:
    """Of at most ``MEAN_OF`` of the images."""
    files = reading.files
    chosen = files[torch.arange(0, len(files), -(-len(files) // MEAN_OF))]
    nothing = Normalisation(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    testing = TestingFiles(read, dataclasses.replace(reading, files=chosen), nothing)
    with tqdm(total=len(chosen), desc="mean", unit="image", disable=None, leave=False) as bar:

        def images() -> Iterator[Tensor]:
            for batch, _ in testing.batches(32, 0, 1):
                yield batch
                bar.update(len(batch))

        return measure(images(), mean)


def open_folder(
    folder: Path,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    readers: int,
    loader: Loader = "torchvision",
) -> Data:
    """``folder``'s train/ and val/ (or test/), as the recipe says.

    Raises:
        DataError: there is no such thing, or no image in it, or what the loader needs isn't installed.
    """
    read = reader(loader)
    train, classes = _find(folder / "train")
    tested = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if tested is None:
        raise DataError(f"{folder} must have val/ or test/ beside train/")
    test, _ = _find(tested, classes)
    augmentation = recipe.augmentation
    drawn = views.training(augmentation)
    crop = augmentation.crop or 0
    size = augmentation.test_crop or crop
    centre = views.testing(size, augmentation.test_shorter)
    validation = None
    if recipe.validation:
        kept, held_out = hold_out(len(train), recipe.validation, seed)
        train, validation = train[kept], train[held_out]
    on_cpu = Reading(train, centre, size, torch.device("cpu"), readers)
    normalise = _normalisation(read, on_cpu, augmentation.mean)

    def testing(files: Files) -> TestingFiles:
        return TestingFiles(read, Reading(files, centre, size, device, readers), normalise)

    return Data(
        train=TrainingFiles(read, Reading(train, drawn, crop, device, readers), normalise),
        validation=None if validation is None else testing(validation),
        test=testing(test),
        classes=classes,
        normalisation=normalise,
        size=size,
        resize=augmentation.test_shorter or size,
    )
