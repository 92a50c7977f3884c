"""Image files read by several processes, with Pillow and torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusedres.training.data.images import DataError
from fusedres.training.data.reading import Indices, Reader, Reading, needed, picture


class Read(NamedTuple):
    """An image as a process read it."""

    pixels: Tensor  # [3, size, size], uint8
    shift: Tensor  # [3]
    label: int


class FileDataset(Dataset[Read | DataError]):
    """Reads the view of a file that its seed gives; an error is an item like others, as processes pass on
    what they return, but not what they raise."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def __len__(self) -> int:
        return len(self.reading.files)

    def __getitem__(self, index: tuple[int, int]) -> Read | DataError:
        from torchvision.transforms.v2 import functional

        (number, seed), reading = index, self.reading
        try:
            pixels = functional.pil_to_tensor(picture(reading.files.paths[number]))
        except DataError as error:
            return error
        height, width = pixels.shape[1:]
        view = reading.view(height, width, seed)
        pixels = functional.crop(pixels, *view.start, *view.shape)
        pixels = functional.resize(pixels, list(view.resized), antialias=True)
        pixels = functional.crop(pixels, *view.corner, reading.size, reading.size)
        if view.mirror:
            pixels = functional.horizontal_flip(pixels)
        return Read(pixels, torch.tensor(view.shift), reading.files.labels[number])


def _stack(batch: list[Read | DataError]) -> tuple[Tensor, Tensor, Tensor] | DataError:
    for read in batch:
        if isinstance(read, DataError):
            return read
    pixels, shifts, labels = zip(*batch, strict=True)
    return torch.stack(pixels), torch.stack(shifts), torch.tensor(labels)


def reader() -> Reader:
    needed("torchvision.transforms.v2", "folders of images need", "torchvision")
    return _read


def _read(reading: Reading, indices: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    loader: Any = DataLoader(
        FileDataset(reading),
        batch_sampler=indices,
        num_workers=reading.readers,
        collate_fn=_stack,
        pin_memory=reading.device.type == "cuda",
        generator=torch.Generator(),  # of its own: it draws even where nothing is asked of it
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        pixels, shifts, labels = (part.to(reading.device, non_blocking=True) for part in batch)
        yield pixels, shifts, labels
