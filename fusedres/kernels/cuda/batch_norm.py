"""Batch norm with what follows it, in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch


@launch.size
def _workspace_size(dtype: str, rows: int, channels: int, quantities: int, device: torch.device) -> int:
    return launch.C.cuda_bn_workspace(dtype, rows, channels, quantities, launch.multiprocessors(device))


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    matrix = launch.matrix(x)
    workspace = launch.floats(_workspace_size(*matrix, 2, x.device), x)
    launch.run("bn_stats", x, *matrix, x, weight, bias, eps, workspace, out)


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    launch.run(
        "bn_running_stats",
        running_mean,
        running_mean.shape[0],
        running_mean,
        running_var,
        weight,
        bias,
        eps,
        out,
    )


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    launch.run(
        "bn_update_running_",
        running_mean,
        running_mean.shape[0],
        running_mean,
        running_var,
        stats,
        count,
        momentum,
    )


def bn_act(
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    launch.run("bn_act", x, *launch.matrix(x), x, stats, residual, residual_stats, relu, out)


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    du: Tensor | None,
    sums: Tensor,
    residual_sums: Tensor | None,
) -> None:
    matrix = launch.matrix(x)
    quantities = 2 if residual is None else 3
    workspace = launch.floats(_workspace_size(*matrix, quantities, x.device), x)
    launch.run(
        "bn_act_backward_reduce",
        x,
        *matrix,
        grad,
        x,
        z,
        stats,
        residual,
        residual_stats,
        relu,
        workspace,
        du,
        sums,
        residual_sums,
    )


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
    dx: Tensor,
    dresidual: Tensor | None,
) -> None:
    launch.run(
        "bn_act_backward_apply",
        x,
        *launch.matrix(x),
        grad,
        x,
        stats,
        sums,
        residual,
        residual_stats,
        residual_sums,
        relu,
        dx,
        dresidual,
    )
