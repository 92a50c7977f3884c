"""bn_stats, bn_running_stats and bn_update_running_: per-channel vectors."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.rows import STATS_ROWS
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out, new_stats


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = x.shape[1]
    check_vectors(x, (channels,), weight=weight, bias=bias)
    (x,) = laid_out(layout(x), x)
    stats = new_stats(x, channels)
    kernel("bn_stats", x)(x, weight, bias, eps, stats)
    return stats


def bn_running_stats(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    channels = running_mean.shape[0]
    check_vectors(
        running_mean,
        (channels,),
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    stats = new_stats(running_mean, channels)
    kernel("bn_running_stats", running_mean)(running_mean, running_var, weight, bias, eps, stats)
    return stats


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    channels = running_mean.shape[0]
    check_vectors(running_mean, (channels,), running_mean=running_mean, running_var=running_var)
    check_vectors(running_mean, (STATS_ROWS, channels), stats=stats)
    if count < 2:
        raise ValueError(f"count must be at least 2 values per channel, got {count}")
    kernel("bn_update_running_", running_mean)(running_mean, running_var, stats, count, momentum)


OPS = {
    "bn_stats": Op(
        "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
        bn_stats,
        lambda x, weight, bias, eps: new_stats(x, x.shape[1]),
    ),
    "bn_running_stats": Op(
        "(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps) -> Tensor",
        bn_running_stats,
        lambda mean, var, weight, bias, eps: new_stats(mean, mean.shape[0]),
    ),
    "bn_update_running_": Op(
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats, SymInt count, float momentum) -> ()",
        bn_update_running_,
        lambda mean, var, stats, count, momentum: None,
    ),
}
