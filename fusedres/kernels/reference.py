"""Plain PyTorch implementations of every op: the oracle, and what runs where no kernel does.

They take any floating dtype. Arithmetic is in float32, or in float64 where the activation is
float64, so an op called on ``x.double()`` gives the reference that the kernels are held against.

Like every implementation they write into tensors that the caller allocated (last arguments); an
output may be the same tensor as ``grad``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.rows import DBIAS, DWEIGHT, MEAN, RSTD, SCALE, SHIFT, VAR


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pack(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    shift = -mean * scale if bias is None else bias - mean * scale
    torch.stack([mean, var, rstd, scale, shift], out=out)


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    wide = x.to(out.dtype)
    mean = wide.mean((0, 2, 3))
    var = (wide - _per_channel(mean)).square().mean((0, 2, 3))
    _pack(mean, var, weight, bias, eps, out)


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    _pack(running_mean, running_var, weight, bias, eps, out)


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    running_mean.lerp_(stats[MEAN], momentum)
    running_var.lerp_(stats[VAR] * (count / (count - 1)), momentum)


def _affine(x: Tensor, stats: Tensor) -> Tensor:
    return x.to(stats.dtype) * _per_channel(stats[SCALE]) + _per_channel(stats[SHIFT])


def bn_act(x: Tensor, stats: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
    u = _affine(x, stats)
    if residual is not None:
        u = u + residual
    out.copy_(torch.relu(u) if relu else u)


def _du(grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool) -> Tensor:
    """The gradient behind the ReLU: 0 where the stored output is <= 0 (so a NaN lets it through)."""
    if not relu:
        return grad
    stored = _affine(x, stats).to(x.dtype) if z is None else z
    return torch.where(stored <= 0, torch.zeros_like(grad), grad)


def bn_act_backward_reduce(
    grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool, du: Tensor | None, sums: Tensor
) -> None:
    masked = _du(grad, x, z, stats, relu)
    wide = masked.to(stats.dtype)
    centred = x.to(stats.dtype) - _per_channel(stats[MEAN])
    sums[DBIAS] = wide.sum((0, 2, 3))
    sums[DWEIGHT] = (wide * centred).sum((0, 2, 3)) * stats[RSTD]
    if du is not None:
        du.copy_(masked)


def bn_act_backward_apply(
    grad: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, relu: bool, out: Tensor
) -> None:
    dx = _per_channel(stats[SCALE]) * _du(grad, x, None, stats, relu).to(stats.dtype)
    if sums is not None:
        per_value = stats[SCALE] * (-x.shape[1] / x.numel())
        centred = x.to(stats.dtype) - _per_channel(stats[MEAN])
        dx = dx + _per_channel(per_value * stats[RSTD] * sums[DWEIGHT]) * centred
        dx = dx + _per_channel(per_value * sums[DBIAS])
    out.copy_(dx)
