"""The processes of one run: started by torchrun, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Processes:
    """Which of how many processes this is.

    Args:
        rank: of this one.
        count: how many there are.
        local_rank: of this one on its machine: the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    # the group that ``total`` is over; None for that of everything
    _totals: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(value, group=self._totals)
        return value

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model``, whose gradients are averaged over the processes in the backward."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def environment() -> Processes:
    """What torchrun says, before anything is set up."""
    rank, count, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    )
    return Processes(rank, count, local)


@contextlib.contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """Inside, the processes of the run can talk to each other: by NCCL on GPUs, by gloo on CPUs."""
    if processes.count == 1:
        yield
        return
    if device.type == "cuda":
        distributed.init_process_group("nccl")
    else:
        distributed.init_process_group("gloo")
        # A thread of gloo's may hold the last tensor that it was given from Python for longer than whoever
        # waits for the sum, and one that lets it go while Python ends aborts the process. Destroying a group
        # waits for its threads, but DistributedDataParallel never lets go of its own: so that only sums
        # tensors of C++, and the others have a group to themselves.
        processes._totals = distributed.new_group()
    try:
        yield
    finally:
        processes._totals = None
        distributed.destroy_process_group()
