"""The pools, in CUDA: behind a batch norm, behind a bias, and over whole images."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch


@launch.size
def _maxpool_workspace_size(
    dtype: str, n: int, height: int, width: int, channels: int, device: torch.device
) -> int:
    return launch.C.cuda_bn_relu_maxpool_workspace(
        dtype, n, height, width, channels, launch.multiprocessors(device)
    )


def bn_relu_maxpool(x: Tensor, stats: Tensor, z: Tensor, index: Tensor) -> None:
    launch.run("bn_relu_maxpool", x, *launch.image(x), x, stats, z, index)


def bias_relu_maxpool(x: Tensor, bias: Tensor | None, z: Tensor) -> None:
    launch.run("bias_relu_maxpool", x, *launch.image(x), x, bias, z)


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor
) -> None:
    image = launch.image(x)
    workspace = launch.floats(_maxpool_workspace_size(*image, x.device), x)
    launch.run("bn_relu_maxpool_backward_reduce", x, *image, grad, index, x, stats, workspace, sums)


def bn_relu_maxpool_backward_apply(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, dx: Tensor
) -> None:
    launch.run("bn_relu_maxpool_backward_apply", x, *launch.image(x), grad, index, x, stats, sums, dx)


def global_avg_pool(x: Tensor, out: Tensor) -> None:
    launch.run("global_avg_pool", x, *launch.image(x), x, out)


def global_avg_pool_backward(grad: Tensor, dx: Tensor) -> None:
    launch.run("global_avg_pool_backward", dx, *launch.image(dx), grad, dx)
