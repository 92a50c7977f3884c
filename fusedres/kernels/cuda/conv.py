"""Convolutions on tensor cores, in CUDA: between two batch norms, and with what follows in a trained net."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch


def convolution(x: Tensor, weight: Tensor, stride: int) -> tuple[str, int, int, int, int, int, int, int]:
    """dtype, N, H, W, C, filters, side, stride."""
    n, channels, height, width = x.shape
    return launch.DTYPES[x.dtype], n, height, width, channels, weight.shape[0], weight.shape[2], stride


@launch.size
def _workspace_size(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    filters: int,
    side: int,
    stride: int,
    device: torch.device,
) -> int:
    return launch.C.cuda_conv_fwd_workspace(
        dtype, n, height, width, channels, filters, side, stride, launch.multiprocessors(device)
    )


def conv_fwd(
    x: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    z: Tensor | None,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    if residual is not None:
        raise ValueError("the CUDA kernel adds no residual in front of a convolution")
    conv = convolution(x, weight, stride)
    workspace = None if y_stats is None else launch.floats(_workspace_size(*conv, x.device), x)
    x, weight = launch.aligned(x, weight)
    launch.run(
        "conv_fwd", x, *conv, x, stats, relu, weight, norm_weight, norm_bias, eps, workspace, y, y_stats
    )


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    z: Tensor,
) -> None:
    conv = convolution(x, weight, stride)
    x, weight, bias, residual = launch.aligned(x, weight, bias, residual)
    launch.run("conv_bias_act", x, *conv, x, weight, bias, residual, relu, z)
