"""Folders of image files with a subfolder for each class, read by several processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from fusedres.training.data.images import Batches, Data, DataError, Order, hold_out
from fusedres.training.normalise import Mean, Normalisation, measure
from fusedres.training.recipe import Augmentation, Recipe

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MEAN_OF = 10_000  # training images that a mean is computed of, at most

# of the colours of ImageNet's pixels from 0 to 1 (Krizhevsky et al. 2012, section 4.1)
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


class Read(NamedTuple):
    """An image as a process read it."""

    pixels: Tensor  # [3, H, W], uint8
    shift: Tensor  # [3], of its colour
    label: int


class Unreadable(NamedTuple):
    path: str
    reason: str


@dataclass(frozen=True)
class Files:
    """Image files and their classes."""

    paths: list[Path]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Files:
        chosen = index.tolist()
        return Files([self.paths[i] for i in chosen], [self.labels[i] for i in chosen])


def _v2() -> Any:
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except ImportError as error:
        raise DataError(f"folders of images need torchvision: pip install torchvision ({error})") from error


def training_transform(augmentation: Augmentation) -> Callable[[Tensor], Tensor]:
    """[3, H, W], uint8 -> [3, crop, crop], uint8; draws from torch's random generator.

    Raises:
        DataError: without a crop images have no common size.
    """
    v2, crop = _v2(), augmentation.crop
    if crop is None:
        raise DataError("augmentation.crop must be given for folders of images")
    steps: list[Any] = []
    if augmentation.area:
        steps.append(v2.RandomResizedCrop(crop, scale=augmentation.area, antialias=True))
    else:
        shorter = augmentation.shorter or (augmentation.test_shorter or crop,) * 2
        steps.append(v2.RandomShortestSize(list(range(shorter[0], shorter[1] + 1)), antialias=True))
        if augmentation.pad:
            steps.append(v2.Pad(augmentation.pad))
        steps.append(v2.RandomCrop(crop))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)  # type: ignore[no-any-return]


def testing_transform(size: int, resize: int | None) -> Callable[[Tensor], Tensor]:
    """[3, H, W], uint8 -> [3, size, size], uint8: the crop in the centre."""
    v2 = _v2()
    return v2.Compose([v2.Resize(resize or size, antialias=True), v2.CenterCrop(size)])  # type: ignore[no-any-return]


class FileDataset(TorchDataset[Read | Unreadable]):
    """Reads and augments a file; what is drawn depends on the seed it is asked with alone."""

    def __init__(self, files: Files, transform: Callable[[Tensor], Tensor], colour: float = 0.0) -> None:
        self.files, self.transform, self.colour = files, transform, colour

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: tuple[int, int]) -> Read | Unreadable:
        from PIL import Image
        from torchvision.transforms.v2 import functional

        number, seed = index
        path = self.files.paths[number]
        try:
            with Image.open(path) as opened:
                pixels = functional.pil_to_tensor(opened.convert("RGB"))
        except Exception as error:  # what a damaged image raises depends on its format
            return Unreadable(str(path), " ".join(str(error).split()))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels = self.transform(pixels)
            weights = torch.randn(3) * self.colour
        return Read(pixels, EIGENVECTORS @ (weights * EIGENVALUES), self.files.labels[number])


def _stack(batch: list[Read | Unreadable]) -> tuple[Tensor, Tensor, Tensor] | Unreadable:
    for read in batch:
        if isinstance(read, Unreadable):
            return read
    pixels, shifts, labels = zip(*batch, strict=True)
    return torch.stack(pixels), torch.stack(shifts), torch.tensor(labels)


def _load(
    dataset: FileDataset,
    indices: Iterator[list[tuple[int, int]]],
    normalise: Normalisation,
    device: torch.device,
    readers: int,
) -> Batches:
    loader: Any = DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=readers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: it draws even where nothing is asked of it
    )
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise DataError(f"{batch.path} is no image that can be read: {batch.reason}")
        pixels, shifts, labels = (part.to(device, non_blocking=True) for part in batch)
        images = normalise(pixels.float() / 255 + shifts[:, :, None, None])
        yield images.contiguous(memory_format=torch.channels_last), labels


class TrainingFiles:
    """Files to train on; see :class:`fusedres.training.data.Training`."""

    def __init__(
        self,
        files: Files,
        augmentation: Augmentation,
        normalise: Normalisation,
        device: torch.device,
        readers: int,
    ) -> None:
        self.dataset = FileDataset(files, training_transform(augmentation), augmentation.colour)
        self.normalise, self.device, self.readers = normalise, device, readers

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, order: Order) -> Batches:
        indices = (list(zip(index.tolist(), seeds.tolist(), strict=True)) for index, seeds in order.batches())
        return _load(self.dataset, indices, self.normalise, self.device, self.readers)


class TestingFiles:
    """Files to test on; see :class:`fusedres.training.data.Testing`."""

    def __init__(
        self,
        files: Files,
        size: int,
        resize: int | None,
        normalise: Normalisation,
        device: torch.device,
        readers: int,
    ) -> None:
        self.dataset = FileDataset(files, testing_transform(size, resize))
        self.normalise, self.device, self.readers = normalise, device, readers

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, size: int, rank: int, processes: int) -> Batches:
        own = torch.arange(rank, len(self), processes)
        indices = ([(index, 0) for index in part.tolist()] for part in torch.split(own, size))
        return _load(self.dataset, indices, self.normalise, self.device, self.readers)


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


def _normalisation(files: Files, mean: Mean, size: int, resize: int | None, readers: int) -> Normalisation:
    """Of at most ``MEAN_OF`` training images, cropped in the centre."""
    chosen = files[torch.arange(0, len(files), -(-len(files) // MEAN_OF))]
    nothing = Normalisation(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    testing = TestingFiles(chosen, size, resize, nothing, torch.device("cpu"), readers)
    with tqdm(total=len(chosen), desc="mean", unit="image", disable=None, leave=False) as bar:

        def read() -> Iterator[Tensor]:
            for images, _ in testing.batches(32, 0, 1):
                yield images
                bar.update(len(images))

        return measure(read(), mean)


def open_folder(folder: Path, recipe: Recipe, seed: int, device: torch.device, readers: int) -> Data:
    """``folder``'s train/ and val/ (or test/), as the recipe says.

    Raises:
        DataError: there is no such thing, or no image in it.
    """
    train, classes = _find(folder / "train")
    tested = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if tested is None:
        raise DataError(f"{folder} must have val/ or test/ beside train/")
    test, _ = _find(tested, classes)
    augmentation = recipe.augmentation
    training_transform(augmentation)  # what it can't do, said first
    size = augmentation.test_crop or augmentation.crop or 0
    validation = None
    if recipe.validation:
        kept, held_out = hold_out(len(train), recipe.validation, seed)
        train, validation = train[kept], train[held_out]
    normalise = _normalisation(train, augmentation.mean, size, augmentation.test_shorter, readers)

    def testing(files: Files) -> TestingFiles:
        return TestingFiles(files, size, augmentation.test_shorter, normalise, device, readers)

    return Data(
        train=TrainingFiles(train, augmentation, normalise, device, readers),
        validation=None if validation is None else testing(validation),
        test=testing(test),
        classes=classes,
        normalisation=normalise,
        size=size,
        resize=augmentation.test_shorter or size,
    )
