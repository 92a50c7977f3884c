"""What is asked of a reader of image files, and what it gives."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fusedres.training.data.images import DataError
from fusedres.training.data.views import Viewer

Loader = Literal["torchvision", "dali"]

# for each batch the images, by number, and their seeds
Indices = Iterator[list[tuple[int, int]]]


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


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Args:
        files: the images.
        view: of them.
        size: px, side of a view's crop.
        device: that the pixels are put on.
        readers: processes or threads that read.
    """

    files: Files
    view: Viewer
    size: int
    device: torch.device
    readers: int


class Reader(Protocol):
    def __call__(self, reading: Reading, indices: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each batch pixels [n, 3, size, size], uint8, their shifts [n, 3], and labels [n]; no batch
        is larger than the first.

        Raises:
            DataError: a file can't be read; names it.
        """


def reader(loader: Loader) -> Reader:
    """Raises DataError if what the loader needs isn't installed."""
    module: Any = importlib.import_module(f"fusedres.training.data.by_{loader}")
    return module.reader()  # type: ignore[no-any-return]


def needed(module: str, who: str, package: str) -> Any:
    """A module; DataError if it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{who} {package}: pip install {package} ({error})") from error


def picture(path: Path) -> Any:
    """A file as Pillow reads it, in RGB.

    Raises:
        DataError: it can't be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except Exception as error:  # what a damaged image raises depends on its format
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no image that can be read: {reason}") from error
