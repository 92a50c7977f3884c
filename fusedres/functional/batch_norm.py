"""What a batch norm consists of, and what callers may pass for it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.functional.processes import Over, moments_of_all

_OPS = torch.ops.fusedres


class BatchNorm(NamedTuple):
    """What a batch norm consists of, in the terms of :func:`torch.nn.functional.batch_norm`.

    Args:
        weight: [C], gamma, or None for 1.
        bias: [C], beta, or None for 0.
        running_mean: [C], updated in place when training; None to keep none.
        running_var: [C], likewise; takes the unbiased variance.
        training: normalise with the batch's statistics, else with the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        group: a torch.distributed.ProcessGroup whose batches are one when training; None for this process's.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    group: Any = None

    @property
    def over(self) -> Over:
        return Over(self.training, self.group)

    def vectors(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """weight and bias as the ops on ``x`` take them."""
        dtype = ops.stats_dtype(x)
        weight = None if self.weight is None else self.weight.to(dtype).contiguous()
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        return weight, bias

    def stats(self, x: Tensor) -> Tensor:
        """The per-channel vectors that normalise ``x``; updates the running ones when training."""
        with torch.no_grad():
            vectors = self.vectors(x)
            if not self.training:
                return _OPS.bn_running_stats(self.running_mean, self.running_var, *vectors, self.eps)  # type: ignore[no-any-return]
            stats: Tensor = _OPS.bn_stats(x, *vectors, self.eps)
            return self.update(stats, x.numel() // x.shape[1])

    def update(self, stats: Tensor, count: int) -> Tensor:
        """Take a batch's statistics, of ``count`` values per channel, into the running ones.

        Returns:
            [5, C], what normalises: ``stats``, or those over all processes.
        """
        if self.group is not None:
            return self._update_by_all(stats, count)
        if self.running_mean is not None:
            _OPS.bn_update_running_(self.running_mean, self.running_var, stats, count, self.momentum)
        return stats

    def _update_by_all(self, stats: Tensor, count: int) -> Tensor:
        mean, var, total = moments_of_all(stats, count, self.group)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * (total / (total - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return _OPS.bn_running_stats(mean, var, *self.vectors(stats), self.eps)  # type: ignore[no-any-return]

    def plain(self, x: Tensor) -> Tensor:
        """PyTorch's own."""
        if self.group is not None:
            raise RuntimeError(
                "a batch norm over several processes has no forward-mode derivative or transform"
            )
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )

    def kept_in(self, dtype: torch.dtype) -> bool:
        """Whether the running statistics, if any, are of ``dtype``."""
        return self.running_mean is None or self.running_mean.dtype == dtype


def check_activation(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be 4D, [N, C, H, W], got {x.dim()}D {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")


def check_batch_norm(
    x: Tensor, norm: BatchNorm, prefix: str = "", shape: tuple[int, ...] | None = None
) -> None:
    """Raises unless ``norm`` fits ``x``, or an activation like it of another ``shape``."""
    check_activation(x)
    shape = x.shape if shape is None else shape
    channels = shape[1]
    for name, v in zip(norm._fields[:4], norm[:4], strict=True):
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(
                f"{prefix}{name} must have one value per channel of x, [{channels}], got {list(v.shape)}"
            )
        if v.device != x.device:
            raise ValueError(f"{prefix}{name} must be on the device of x, {x.device}, got {v.device}")
        if v.dtype != x.dtype and v.dtype != torch.float32:
            raise TypeError(
                f"{prefix}{name} must be torch.float32 or the dtype of x, {x.dtype}, got {v.dtype}"
            )
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var must both be given, or neither")
    if norm.training:
        if math.prod(shape) == channels and norm.group is None:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
            )
    elif norm.running_mean is None:
        raise ValueError(f"{prefix}running_mean and {prefix}running_var are needed when training=False")
