"""A batch norm over the batches of several processes: sums per channel, added up over all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from fusedres.kernels.rows import MEAN, SLOPE, VAR


class Over(NamedTuple):
    """The values that a batch norm's statistics are of.

    Args:
        training: the batch's, else none: they are fixed.
        group: the processes whose batches are one, a torch.distributed.ProcessGroup; None for this one's.
    """

    training: bool
    group: Any = None

    def through(self, sums: Tensor | None, x: Tensor) -> Tensor | None:
        """The sums by which the gradient of ``x`` depends on the statistics; None if it doesn't."""
        if not self.training or sums is None or self.group is None:
            return sums if self.training else None
        return _sums_of_all(sums, _count(x), self.group)


def moments_of_all(stats: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over the values of all processes, and how many those are.

    Args:
        stats: [5, C], of this process's values.
        count: how many it has per channel.
        group: the processes.
    """
    # in float64: the variance is a difference of sums that may be large
    mean, var = stats[MEAN].double(), stats[VAR].double()
    mean, square, total = _mean_of_all(torch.stack((mean, var + mean.square())), count, group)
    return mean.to(stats.dtype), (square - mean.square()).clamp_min_(0).to(stats.dtype), total


def _sums_of_all(sums: Tensor, count: int, group: Any) -> Tensor:
    """[4, C]: those of the weight and bias stay this process's, as every parameter's gradient."""
    # the others are linear in them, by vectors that all processes share, and divided by the number of values
    slope, offset, _ = _mean_of_all(sums[SLOPE:].double(), count, group)
    return torch.cat((sums[:SLOPE], torch.stack((slope, offset)).to(sums.dtype)))


def _mean_of_all(rows: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The two rows, each process's weighted by its number of values, and the number of all."""
    weighted = rows * count if count > 0 else torch.zeros_like(rows)
    flat = torch.cat((weighted.flatten(), rows.new_full((1,), count)))
    distributed.all_reduce(flat, group=group)
    first, second = (flat[:-1] / flat[-1]).chunk(2)
    return first, second, flat[-1]


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]
