"""conv_dgrad on tensor cores, of stride 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch

VEC = 8  # channels of one access, in a dtype of two bytes


@launch.size
def _workspace_size(dtype: str, n: int, h: int, w: int, c: int, device: torch.device) -> int:
    return launch.C.cuda_conv_dgrad_workspace(dtype, n, h, w, c, launch.multiprocessors(device))


def conv_dgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    weight: Tensor,
    stride: int,
    add: Tensor | None,
    first: int,
    x: Tensor | None,
    x_stats: Tensor | None,
    relu: bool,
    dx: Tensor,
    x_sums: Tensor | None,
) -> None:
    filters, channels, side, _ = weight.shape
    pitch, compact, workspace = 0, False, None
    if add is not None:
        compact = add.shape[2:] != dx.shape[2:]
        if first % VEC or add.shape[1] % VEC:
            add = add[:, first : first + channels].contiguous(memory_format=torch.channels_last)
            first = 0
        pitch, add = add.shape[1], add[:, first:]
    if x_sums is not None:
        workspace = launch.floats(_workspace_size(*launch.image(dx), dx.device), dx)
    launch.run(
        "conv_dgrad",
        dx,
        *(*launch.image(dx), filters, side),
        *launch.aligned(du, y, y_stats, y_sums, weight, add),
        *(pitch, compact, *launch.aligned(x, x_stats), relu),
        *(workspace, dx, x_sums),
    )
