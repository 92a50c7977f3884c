"""Images from files, folders and .npz archives, as a net reads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fusedres.cli.errors import USAGE, CommandError, first_line, require

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Format(NamedTuple):
    """What a net reads: square images of ``size`` px.

    An image is resized to ``shorter`` px on its shorter side and cropped in the centre; with None it is
    resized to the square.
    """

    size: int
    shorter: int | None


IMAGENET, CIFAR = Format(224, 256), Format(32, None)


def preprocess(path: Path, format: Format = IMAGENET) -> Tensor:
    """An image file as a normalised batch of one: [1, 3, size, size], fp32."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError as error:
        raise CommandError(f"there is no image {path}") from error
    except Exception as error:  # what a damaged image raises depends on its format
        raise CommandError(f"{path} is no image that can be read: {first_line(error)}") from error
    return _normalise(_fit(image, format))


def _fit(image: Image.Image, format: Format) -> npt.NDArray[np.uint8]:
    """[size, size, 3]"""
    from PIL import Image

    size, shorter = format
    if shorter is None:
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(image)
    short = min(image.size)
    width, height = (shorter * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def _normalise(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """[H, W, 3] -> [1, 3, H, W], fp32"""
    x = torch.from_numpy(pixels.astype(np.float32) / 255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class Images:
    """Many images, read when they are needed.

    Args:
        path: where they are from.
        items: files, or pixels [N, H, W, 3].
        labels: a class for each; None where they aren't asked for.
        format: what they are made into.
    """

    path: Path
    items: list[Path] | npt.NDArray[np.uint8]
    labels: npt.NDArray[Any] | None
    format: Format

    def __len__(self) -> int:
        return len(self.items)

    def first(self, count: int) -> Images:
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, items=self.items[:count], labels=labels)

    def batches(self, size: int, description: str) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of at most ``size``: [N, 3, size, size], fp32, channels_last, and labels [N].

        An image that can't be read is reported and left out.

        Raises:
            CommandError: no image can be read.
        """
        read = 0
        with tqdm(total=len(self), desc=description, unit="image", disable=None, leave=False) as bar:
            for start in range(0, len(self), size):
                chosen = range(start, min(start + size, len(self)))
                images = {i: image for i in chosen if (image := self._image(i)) is not None}
                if images:
                    read += len(images)
                    x = torch.cat(list(images.values())).contiguous(memory_format=torch.channels_last)
                    labels = None if self.labels is None else torch.from_numpy(self.labels[list(images)])
                    yield x, labels
                bar.update(len(chosen))
        if not read:
            raise CommandError(f"none of the images in {self.path} can be read")

    def _image(self, index: int) -> Tensor | None:
        if isinstance(self.items, list):
            try:
                return preprocess(self.items[index], self.format)
            except CommandError as error:
                tqdm.write(f"fusedres: note: left out: {error}", file=sys.stderr)
                return None
        pixels = self.items[index]
        if pixels.shape[:2] != (self.format.size,) * 2:
            from PIL import Image

            pixels = _fit(Image.fromarray(pixels), self.format)
        return _normalise(pixels)


def find(path: Path, format: Format, option: str, classes: int | None = None) -> Images:
    """The images of a folder or an .npz, in sorted order.

    Args:
        path: a folder, searched recursively, or an .npz with ``images``, uint8 [N, H, W, 3].
        format: what the net reads. Images of an .npz that have its size are not resized or cropped.
        option: that named the path, for messages.
        classes: of the net, if labels are needed: a folder then has a subfolder for each, and an .npz
            ``labels``, integers [N]. None: without labels.

    Raises:
        CommandError: there is no such thing, no image in it, or labels that aren't the net's.
    """
    if path.is_dir():
        require("PIL.Image", f"{option} with a folder", "pillow")
        try:
            files, labels = _in_folder(path) if classes is None else _in_subfolders(path, option, classes)
        except OSError as error:
            raise CommandError(f"{option}: can't read {path}: {first_line(error)}", USAGE) from error
        if not files:
            raise CommandError(f"{option} {path} has no images ({' '.join(SUFFIXES)})", USAGE)
        return Images(path, files, labels, format)
    if not path.exists():
        raise CommandError(f"{option}: there is no {path}", USAGE)
    if path.suffix != ".npz":
        raise CommandError(f"{option} must be a folder of images or an .npz, got {path}", USAGE)
    return _in_archive(path, format, option, classes)


def _in_folder(folder: Path) -> tuple[list[Path], None]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()), None


def _in_subfolders(folder: Path, option: str, classes: int) -> tuple[list[Path], npt.NDArray[np.int64]]:
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir())
    if len(subfolders) != classes:
        raise CommandError(
            f"{option} {folder} must have a subfolder for each of the net's {classes} classes, "
            f"got {len(subfolders)}",
            USAGE,
        )
    files = [(file, label) for label, sub in enumerate(subfolders) for file in _in_folder(sub)[0]]
    return [file for file, _ in files], np.array([label for _, label in files], dtype=np.int64)


def _in_archive(path: Path, format: Format, option: str, classes: int | None) -> Images:
    names = ("images",) if classes is None else ("images", "labels")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            found = {} if missing else {name: archive[name] for name in names}
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CommandError(f"{path} is no .npz that numpy reads: {first_line(error)}", USAGE) from error
    if missing:
        raise CommandError(f"{option} {path} has no array {missing[0]}", USAGE)
    pixels = found["images"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape[1:]:
        raise CommandError(
            f"images of {path} must be uint8 [N, H, W, 3], got {pixels.dtype} {list(pixels.shape)}", USAGE
        )
    if not len(pixels):
        raise CommandError(f"{option} {path} has no images", USAGE)
    if pixels.shape[1:3] != (format.size,) * 2:
        require("PIL.Image", f"resizing the images of {path}", "pillow")
    labels = None if classes is None else _checked(found["labels"], len(pixels), path, classes)
    return Images(path, pixels, labels, format)


def _checked(labels: npt.NDArray[Any], images: int, path: Path, classes: int) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (images,):
        raise CommandError(
            f"labels of {path} must be integers [{images}], got {labels.dtype} {list(labels.shape)}", USAGE
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise CommandError(
            f"labels of {path} must be from 0 to {classes - 1}, the net's classes, "
            f"got {labels.min()} to {labels.max()}",
            USAGE,
        )
    return labels.astype(np.int64)
