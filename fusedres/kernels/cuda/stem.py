"""The stem's convolution and its weight's gradient, in CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch
from fusedres.kernels.rows import STEM_CHANNELS


@launch.size
def _workspace_size(op: str, *problem: Any, device: torch.device) -> int:
    function = getattr(launch.C, f"cuda_{op}_workspace")
    return function(*problem, launch.multiprocessors(device))  # type: ignore[no-any-return]


def _problem(x: Tensor, y: Tensor, filters: int) -> tuple[str, int, int, int, int]:
    n, _, height, width = x.shape
    return launch.DTYPES[y.dtype], n, height, width, filters


def _strided(t: Tensor) -> tuple[str, Tensor, tuple[int, ...]]:
    return str(t.dtype).removeprefix("torch."), t, t.stride()


def _image(x: Tensor) -> Tensor:
    """``x`` in a layout that finds the values of an image by an int."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if span < 2**31 else x.contiguous()


def stem_conv(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    pixels: Tensor,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    problem = _problem(x, y, y.shape[1])
    workspace = None
    if y_stats is not None:
        workspace = launch.floats(_workspace_size("stem_conv", *problem, device=x.device), x)
    vectors = norm_weight, norm_bias, eps
    operands = *_strided(_image(x)), *_strided(weight)
    launch.run("stem_conv", x, *problem, *operands, *vectors, workspace, pixels, y, y_stats)


def stem_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pool: bool,
    z: Tensor,
) -> None:
    mean = (0.0,) * STEM_CHANNELS if mean is None else mean
    rstd = (1.0,) * STEM_CHANNELS if std is None else [1 / value for value in std]
    problem = _problem(x, z, z.shape[1])
    image = *_strided(_image(x)), tuple(mean), tuple(rstd)
    launch.run("stem_bias_act", x, *problem, *image, *_strided(weight), bias, pool, z)


def stem_wgrad(dy: Tensor, pixels: Tensor, dweight: Tensor) -> None:
    dy, pixels = launch.aligned(dy, pixels)
    n, filters, rows, columns = dy.shape
    # of the smallest image that has so many outputs
    problem = launch.DTYPES[dy.dtype], n, 2 * rows - 1, 2 * columns - 1, filters
    workspace = launch.floats(_workspace_size("stem_wgrad", *problem, device=dy.device), dy)
    launch.run("stem_wgrad", dy, *problem, dy, pixels, workspace, *_strided(dweight))
