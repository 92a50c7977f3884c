"""Images from files, folders and .npz archives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fusedres.cli import views
from fusedres.cli.errors import USAGE, CommandError, first_line, require
from fusedres.cli.views import Format, Pixels
from fusedres.training.normalise import IMAGENET as IMAGENET_PIXELS
from fusedres.training.normalise import Normalisation

T = TypeVar("T")
ASPECT = 50  # an image that is more times as long as wide becomes too large with a shorter side of hundreds
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def preprocess(
    path: Path, format: Format = views.IMAGENET, normalise: Normalisation = IMAGENET_PIXELS
) -> Tensor:
    """An image file as a batch of one, its crop in the centre: [1, 3, size, size], fp32."""
    return views.normalised(_centre(read(path), format)[None], normalise)


def read(path: Path) -> Pixels:
    """An image file: [H, W, 3]"""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if max(opened.size) > ASPECT * min(opened.size):
                width, height = opened.size
                raise ValueError(
                    f"one side must be at most {ASPECT} times the other, got {width}x{height} px"
                )
            return np.array(opened.convert("RGB"))
    except FileNotFoundError as error:
        raise CommandError(f"there is no image {path}") from error
    except Exception as error:  # what a damaged image raises depends on its format
        raise CommandError(f"{path} is no image that can be read: {first_line(error)}") from error


def _centre(pixels: Pixels, format: Format) -> Tensor:
    """[H, W, 3] -> [3, size, size], uint8"""
    return views.centre(views.planes(views.sized(pixels, format)), format.size)


@dataclass(frozen=True)
class Images:
    """Many images, read when they are needed.

    Args:
        path: where they are from.
        items: files, or pixels [N, H, W, 3].
        labels: a class for each; None where they aren't asked for.
        names: of the classes: the subfolders that they are in.
    """

    path: Path
    items: list[Path] | Pixels
    labels: npt.NDArray[np.int64] | None = None
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def first(self, count: int) -> Images:
        labels = None if self.labels is None else self.labels[:count]
        return replace(self, items=self.items[:count], labels=labels)

    def spread(self, count: int) -> Images:
        """``count`` of them, at even distances."""
        if count >= len(self):
            return self
        chosen = np.arange(count) * len(self) // count
        items = [self.items[i] for i in chosen] if isinstance(self.items, list) else self.items[chosen]
        return replace(self, items=items, labels=None if self.labels is None else self.labels[chosen])

    def format(self, format: Format) -> Format:
        """Of crops in the centre: images of an archive that have the net's size are left as they are."""
        if isinstance(self.items, list) or self.items.shape[1:3] != (format.size,) * 2:
            return format
        return Format(format.size, None)

    def batches(
        self, size: int, description: str, format: Format, normalise: Normalisation
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of at most ``size``: [N, 3, size, size], fp32, channels_last, and labels [N].

        As :meth:`views`; crops are in the centre.
        """
        format = self.format(format)
        for found in self.views(size, description, lambda pixels: _centre(pixels, format)):
            x = views.normalised(torch.stack([*found.values()]), normalise)
            yield x, None if self.labels is None else torch.from_numpy(self.labels[list(found)])

    def views(self, size: int, description: str, make: Callable[[Pixels], T]) -> Iterator[dict[int, T]]:
        """What ``make`` makes of at most ``size`` images at a time, by index.

        Images are read in as many threads as torch has. One that can't be read is reported and left out.

        Raises:
            CommandError: no image can be read.
        """

        def made(index: int) -> T | CommandError:
            try:
                pixels = self._pixels(index)
            except CommandError as error:
                return error
            return make(pixels)

        read = 0
        progress = tqdm(total=len(self), desc=description, unit="image", disable=None, leave=False)
        with progress as bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for start in range(0, len(self), size):
                chosen = range(start, min(start + size, len(self)))
                found: dict[int, T] = {}
                for index, result in zip(chosen, pool.map(made, chosen), strict=True):
                    if isinstance(result, CommandError):
                        tqdm.write(f"fusedres: note: left out: {result}", file=sys.stderr)
                    else:
                        found[index] = result
                if found:
                    read += len(found)
                    yield found
                bar.update(len(chosen))
        if not read:
            raise CommandError(f"none of the images in {self.path} can be read")

    def _pixels(self, index: int) -> Pixels:
        """[H, W, 3]"""
        if isinstance(self.items, list):
            return read(self.items[index])
        return self.items[index]  # type: ignore[no-any-return]


def find(path: Path, option: str, classes: int | None = None) -> Images:
    """The images of a folder or an .npz, in sorted order.

    Args:
        path: a folder, searched recursively, or an .npz with ``images``, uint8 [N, H, W, 3].
        option: that named the path, for messages.
        classes: of the net, if labels are needed: a folder then has a subfolder for each, and an .npz
            ``labels``, integers [N]. None: without labels.

    Raises:
        CommandError: there is no such thing, no image in it, or labels that aren't the net's.
    """
    if path.is_dir():
        require("PIL.Image", f"{option} with a folder", "pillow")
        try:
            found = _in_folder(path) if classes is None else _in_subfolders(path, option, classes)
        except OSError as error:
            raise CommandError(f"{option}: can't read {path}: {first_line(error)}", USAGE) from error
        if not found:
            raise CommandError(f"{option} {path} has no images ({' '.join(SUFFIXES)})", USAGE)
        return found
    if not path.exists():
        raise CommandError(f"{option}: there is no {path}", USAGE)
    if path.suffix != ".npz":
        raise CommandError(f"{option} must be a folder of images or an .npz, got {path}", USAGE)
    return _in_archive(path, option, classes)


def _in_folder(folder: Path) -> Images:
    return Images(folder, _files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _in_subfolders(folder: Path, option: str, classes: int) -> Images:
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir())
    if len(subfolders) != classes:
        raise CommandError(
            f"{option} {folder} must have a subfolder for each of the net's {classes} classes, "
            f"got {len(subfolders)}",
            USAGE,
        )
    files = [(file, label) for label, sub in enumerate(subfolders) for file in _files(sub)]
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Images(folder, [file for file, _ in files], labels, [sub.name for sub in subfolders])


def _in_archive(path: Path, option: str, classes: int | None) -> Images:
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
    return Images(
        path, pixels, None if classes is None else _checked(found["labels"], len(pixels), path, classes)
    )


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
