"""DistributedDataParallel over two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from twin_steps import assert_same, exact_twins, left_behind, norms_of

import fusedres

pytestmark = pytest.mark.xdist_group("two processes")


class WithAnUnusedHead(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.unused = net, nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def trained(net: nn.Module, batches: list[Tensor], accumulate: bool, **options: Any) -> dict[str, Tensor]:
    """What a step of SGD for each batch leaves behind."""
    whole = WithAnUnusedHead(net) if options.get("find_unused_parameters") else net
    parallel = DistributedDataParallel(whole, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        if accumulate:
            first, x = x.chunk(2)
            with parallel.no_sync():
                (parallel(first).square().mean() / 2).backward()
            (parallel(x).square().mean() / 2).backward()
        else:
            parallel(x).square().mean().backward()
        optimizer.step()
    return left_behind(net)


def train_both(rank: int, name: str, accumulate: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    """The fused net's statistics, and sums of everything else; raises where it isn't as its eager twin."""
    eager, fused = exact_twins(name)
    torch.manual_seed(rank)
    batches = [images(dtype=torch.float64) for _ in range(2)]
    expected = trained(eager, batches, accumulate, **options)
    with fusedres.backend("reference"), FusedOps() as ops:
        found = trained(fused, batches, accumulate, **options)
    assert ops.batch_norms == (4 if accumulate else 2) * norms_of(fused)
    assert_same(found, expected)
    return {key: value if "running" in key else value.sum() for key, value in found.items()}


@pytest.mark.parametrize(
    ("name", "accumulate", "options"),
    [
        ("basic", False, {}),
        ("torchvision bottleneck", True, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
        ("timm basic", False, {"static_graph": True}),
        ("basic", False, {"find_unused_parameters": True}),
        ("torchvision basic", True, {"broadcast_buffers": False}),
    ],
)
def test_as_the_eager_twin(two_processes, name, accumulate, options):
    first, second = two_processes(train_both, name, accumulate, options)
    for key, value in first.items():
        same = torch.equal(value, second[key])
        # each process updates its own by the last batch
        assert same != ("running" in key), key


def frozen_step(rank: int, name: str) -> None:
    """With fixed statistics the gradients are those of one process with the whole batch."""
    eager, fused = exact_twins(name)
    torch.manual_seed(0)
    whole = images(dtype=torch.float64)
    if rank == 1:  # everything is the first process's from the start
        for value in fused.state_dict().values():
            value.add_(1)
    parallel = DistributedDataParallel(fused.eval())
    with fusedres.backend("reference"), FusedOps() as ops:
        parallel(whole.chunk(2)[rank]).square().mean().backward()
    assert ops.batch_norms == norms_of(fused)
    eager.eval()(whole).square().mean().backward()
    assert_same(left_behind(fused), left_behind(eager))


@pytest.mark.parametrize("name", ["bottleneck", "timm bottleneck"])
def test_fixed_statistics(two_processes, name):
    two_processes(frozen_step, name)
