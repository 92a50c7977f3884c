"""From checked tensors to a launcher of the compiled module: addresses, sizes and a stream.

Tensors come checked and in channels_last from ``ops``. Scratch memory is allocated on this side, so that
the launchers never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres import _C

C = _C
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIZES: list[Any] = []


def addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a launcher on the current stream of the device of ``x``; tensors become addresses."""
    device = x.device
    function = getattr(C, f"cuda_{name}")
    arguments = addresses(arguments)
    # as Triton finds it: a Stream object costs more than the launch
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        function(*arguments, multiprocessors(device), stream)
        return
    with torch.cuda.device(device):
        function(*arguments, multiprocessors(device), stream)


def matrix(x: Tensor) -> tuple[str, int, int]:
    """dtype, rows, channels."""
    n, c, h, w = x.shape
    return DTYPES[x.dtype], n * h * w, c


def image(x: Tensor) -> tuple[str, int, int, int, int]:
    """dtype, N, H, W, C."""
    n, c, h, w = x.shape
    return DTYPES[x.dtype], n, h, w, c


def aligned(*tensors: Tensor | None) -> list[Any]:
    """The tensors, or copies of those that don't begin at a multiple of 16 bytes: part of another may not."""
    return [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def floats(number: int, x: Tensor) -> Tensor:
    return torch.empty(number, dtype=torch.float32, device=x.device)


def size(function: Callable[..., int]) -> Callable[..., int]:
    """Of scratch memory; it depends on the arguments and the device alone, so that each is asked for once."""
    cached = functools.lru_cache(maxsize=4096)(function)
    SIZES.append(cached)
    return cached


def forget_sizes() -> None:
    """For another number of multiprocessors."""
    for cached in SIZES:
        cached.cache_clear()
