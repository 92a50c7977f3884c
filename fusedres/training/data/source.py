"""Which data set a name or a path is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fusedres.training.data.images import Data, DataError, hold_out
from fusedres.training.data.pixels import Pixels, TestingPixels, TrainingPixels, normalisation
from fusedres.training.data.reading import Loader
from fusedres.training.recipe import Recipe

DIGITS = "digits"
DIGITS_SIZE = 16
DIGITS_TEST_SHARE = 0.2
CIFAR_FOLDERS = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100"}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WHAT = (
    "a folder with one *train*.npz and one *test*.npz (images uint8 [N, H, W, 3], labels integers [N]), with "
    "torchvision's cifar-10-batches-py or cifar-100-python, or with train/ and val/ that have a subfolder of "
    "image files for each class"
)


def open_data(
    source: str,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    readers: int = 0,
    loader: Loader = "torchvision",
) -> Data:
    """The data set that ``source`` names, split, augmented and normalised as the recipe says.

    Args:
        source: "digits", or a folder.
        recipe: its ``augmentation`` and ``validation``.
        seed: of the splits.
        device: that the images are put on.
        readers: processes that read image files, 0 to read them in this one; threads with "dali".
        loader: what reads image files.

    Raises:
        DataError: there is no such data set, or it can't be read; one line.
    """
    held = _held(source, seed)
    if held is None:
        from fusedres.training.data.folder import open_folder

        return open_folder(Path(source), recipe, seed, device, readers, loader)
    if loader != "torchvision":
        raise DataError(f"the loader {loader} is for folders of images, {source} is held in memory")
    return _of_pixels(*held, recipe, seed, device)


def _held(source: str, seed: int) -> tuple[Pixels, Pixels, list[str]] | None:
    """Images to train and to test on that are held in memory, and their classes; None for image files."""
    if source == DIGITS:
        return _digits(seed)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; the data must be {DIGITS} or {WHAT}")
    if sorted(folder.glob("*.npz")):
        return read_archives(folder)
    for name, kind in CIFAR_FOLDERS.items():
        if folder.name == name or (folder / name).is_dir():
            return _cifar(folder.parent if folder.name == name else folder, kind)
    if (folder / "train").is_dir():
        return None
    raise DataError(f"{folder} must be {WHAT}")


def _of_pixels(
    train: Pixels, test: Pixels, classes: list[str], recipe: Recipe, seed: int, device: torch.device
) -> Data:
    validation = None
    if recipe.validation:
        kept, held_out = hold_out(len(train), recipe.validation, seed)
        train, validation = train[kept], train[held_out]
    normalise = normalisation(train, recipe.augmentation.mean)
    return Data(
        train=TrainingPixels(train.to(device), recipe.augmentation, normalise),
        validation=None if validation is None else TestingPixels(validation.to(device), normalise),
        test=TestingPixels(test.to(device), normalise),
        classes=classes,
        normalisation=normalise,
        size=min(test.images.shape[1:3]),
        resize=None,
    )


def _digits(seed: int) -> tuple[Pixels, Pixels, list[str]]:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, scaled to 16x16, in grey.

    A fifth, the same share of every class, is for testing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f"{DIGITS} needs scikit-learn: pip install scikit-learn ({error})") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=DIGITS_SIZE, mode="bilinear", align_corners=False)
    pixels = Pixels(
        images.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous(),
        torch.from_numpy(data.target).long(),
    )
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_TEST_SHARE, stratify=data.target, random_state=seed
    )
    return pixels[torch.from_numpy(train)], pixels[torch.from_numpy(test)], list("0123456789")


def read_archives(folder: Path) -> tuple[Pixels, Pixels, list[str]]:
    """What a folder's *train*.npz and *test*.npz have, and the names of the classes.

    Raises:
        DataError: there are no such files, or they have no such images.
    """
    found = {}
    for part in ("train", "test"):
        paths = sorted(folder.glob(f"*{part}*.npz"))
        if len(paths) != 1:
            names = ", ".join(path.name for path in paths) or "none"
            raise DataError(f"{folder} must have one *{part}*.npz, got {names}")
        found[part] = _archive(paths[0])
    train, test = found["train"], found["test"]
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [list(part.images.shape[1:]) for part in (train, test)]
        raise DataError(f"images to test on must be of the shape {shapes[0]}, got {shapes[1]} in {folder}")
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise DataError(
            f"labels to test on must be from 0 to {classes - 1}, as those to train on, "
            f"got {int(test.labels.max())} in {folder}"
        )
    is_cifar10 = classes == 10 and paths[0].name.startswith("cifar10")
    return train, test, CIFAR10_CLASSES if is_cifar10 else [str(number) for number in range(classes)]


def _archive(path: Path) -> Pixels:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = f"no array {error.args[0]}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} can't be read: {reason}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise DataError(
            f"images of {path} must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"labels of {path} must be integers [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0:
        raise DataError(f"labels of {path} must not be negative, got {labels.min()}")
    return Pixels(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _cifar(root: Path, kind: str) -> tuple[Pixels, Pixels, list[str]]:
    """What torchvision downloaded: its files are pickles, which it checks before it reads them."""
    try:
        datasets: Any = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise DataError(f"{root} needs torchvision: pip install torchvision ({error})") from error
    parts = []
    for train in (True, False):
        try:
            data = getattr(datasets, kind)(root, train=train)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise DataError(f"{root} can't be read: {error}") from error
        parts.append(Pixels(torch.from_numpy(data.data), torch.tensor(data.targets)))
    return parts[0], parts[1], list(data.classes)
