"""Image files decoded and resized by NVIDIA DALI: on the GPU that trains, or by threads."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedres.training.data.images import DataError
from fusedres.training.data.reading import Indices, Reader, Reading, needed, picture
from fusedres.training.data.views import View

AHEAD = 2  # batches whose files are read before DALI asks for them


class Encoded(NamedTuple):
    """An image as its file has it, and what is to be made of it."""

    asked: tuple[int, int]  # its number and seed
    data: NDArray[np.uint8]
    view: View


def reader() -> Reader:
    needed("PIL.Image", "the loader dali needs", "pillow")
    needed("nvidia.dali.fn", "the loader dali needs", "nvidia-dali-cuda130")
    return _read


def _read(reading: Reading, indices: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    first = next(indices, None)
    if first is None:
        return
    with contextlib.closing(_encoded(reading, itertools.chain([first], indices))) as batches:
        waiting: deque[list[Encoded]] = deque()  # taken by DALI, and not given back yet

        def feed() -> tuple[Any, ...]:
            batch = next(batches)  # StopIteration ends the pipeline, too
            waiting.append(batch)
            return _inputs(batch)

        pipeline = _pipeline(reading, feed, len(first))
        while True:
            try:
                pixels = _run(pipeline, reading.device)
            except StopIteration:
                return
            except RuntimeError as error:  # of the whole batch
                raise _error(reading, [image for batch in waiting for image in batch], error) from error
            batch = waiting.popleft()
            shifts = torch.tensor([image.view.shift for image in batch])
            labels = torch.tensor([reading.files.labels[image.asked[0]] for image in batch])
            yield pixels, shifts.to(reading.device), labels.to(reading.device)


def _encoded(reading: Reading, indices: Indices) -> Generator[list[Encoded], None, None]:
    with ThreadPoolExecutor(_threads(reading)) as pool:
        ahead: deque[list[Future[Encoded]]] = deque()
        for batch in indices:
            ahead.append([pool.submit(_open, reading, asked) for asked in batch])
            if len(ahead) > AHEAD:
                yield [image.result() for image in ahead.popleft()]
        for images in ahead:
            yield [image.result() for image in images]


def _threads(reading: Reading) -> int:
    return max(1, reading.readers)


def _open(reading: Reading, asked: tuple[int, int]) -> Encoded:
    from PIL import Image

    number, seed = asked
    path = reading.files.paths[number]
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:  # its header
            width, height = opened.size
    except Exception:
        picture(path)  # says why
        raise
    return Encoded(asked, np.frombuffer(data, np.uint8), reading.view(height, width, seed))


def _inputs(batch: list[Encoded]) -> tuple[Any, ...]:
    """A batch as the pipeline takes it."""
    views = [image.view for image in batch]
    return (
        [image.data for image in batch],
        np.array([view.start for view in views], np.int32),
        np.array([view.shape for view in views], np.int32),
        np.array([view.resized for view in views], np.float32),
        np.array([view.corner for view in views], np.int32),
        np.array([view.mirror for view in views], np.int32),
    )


def _pipeline(reading: Reading, feed: Callable[[], tuple[Any, ...]], largest: int) -> Any:
    """Encoded images to [n, size, size, 3], uint8."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = reading.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=largest,
        num_threads=_threads(reading),
        device_id=reading.device.index or 0 if on_gpu else None,
    )
    with pipeline:
        data, start, shape, resized, corner, mirror = fn.external_source(
            source=feed,
            num_outputs=6,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1, 1, 0],
        )
        images = fn.decoders.image_slice(
            data,
            device="mixed" if on_gpu else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as Pillow does
        )
        images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(
            images,
            start=corner,
            shape=[reading.size, reading.size],
            axis_names="HW",
            out_of_bounds_policy="pad",
        )
        pipeline.set_outputs(fn.flip(images, horizontal=mirror))
    return pipeline


def _run(pipeline: Any, device: torch.device) -> Tensor:
    """The next batch, [n, 3, size, size] in channels_last, in DALI's memory.

    On a GPU in the order of PyTorch's stream: DALI takes the memory back behind what is queued there.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (images,) = pipeline.run(stream)
    return from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _error(reading: Reading, images: list[Encoded], error: RuntimeError) -> Exception:
    """What is to be raised for a batch that DALI gave up: it doesn't say at which image."""
    paths = [reading.files.paths[image.asked[0]] for image in images]
    for path in paths:
        try:
            picture(path)
        except DataError as found:
            return found
    if len(images) > 1:  # Pillow reads them all
        for image in images:
            try:
                list(_read(reading, iter([[image.asked]])))
            except DataError as found:
                return found
        return error
    reason = str(error).partition("encountered:")[2].partition("Current pipeline")[0] or str(error)
    return DataError(f"{paths[0]} is no image that DALI can read: {' '.join(reason.split())}")
