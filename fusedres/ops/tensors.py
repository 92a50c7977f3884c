"""What the ops share: checks, one memory layout, and the small tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.kernels.rows import STATS_ROWS, SUMS_ROWS
from fusedres.ops.dispatch import layout


class Op(NamedTuple):
    """A registered op: its schema, what it does, and its fake."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]


def stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def new_stats(x: Tensor, channels: int) -> Tensor:
    return torch.empty((STATS_ROWS, channels), dtype=stats_dtype(x), device=x.device)


def new_sums(stats: Tensor, residual_stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
    shape = (SUMS_ROWS, stats.shape[1])
    return stats.new_empty(shape), None if residual_stats is None else stats.new_empty(shape)


def check_vectors(
    x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, **vectors: Tensor | None
) -> None:
    """Kernels get bare pointers: what they would misread is refused here. dtype: None for that of stats."""
    dtype, device = stats_dtype(x) if dtype is None else dtype, x.device
    for name, v in vectors.items():
        if v is None or (v.dtype is dtype and v.shape == shape and v.device == device and v.is_contiguous()):
            continue
        if v.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {v.dtype}")
        raise ValueError(
            f"{name} must be contiguous, {list(shape)} on {device}, "
            f"got {list(v.shape)} with strides {v.stride()} on {v.device}"
        )


def check_activations(x: Tensor, stats: Tensor, **others: Tensor | None) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(shape)}")
    check_vectors(x, (STATS_ROWS, shape[1]), stats=stats)
    for name, t in others.items():
        if t is None or (t.dtype is dtype and t.shape == shape and t.device == device):
            continue
        if t.dtype is not dtype:
            raise TypeError(f"{name} must have the dtype of x, {dtype}, got {t.dtype}")
        raise ValueError(
            f"{name} must have the shape and device of x, {list(shape)} on {device}, "
            f"got {list(t.shape)} on {t.device}"
        )


def laid_out(memory: torch.memory_format, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous(memory_format=memory) for t in tensors]


def new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout(x))


def or_nothing(like: Tensor, t: Tensor | None) -> Tensor:
    """An op can't return None: an empty tensor stands for it."""
    return like.new_empty(0) if t is None else t
