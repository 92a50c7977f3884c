"""nn.SyncBatchNorm: statistics over the batches of all processes, as if they were one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from twin_steps import assert_as_exact, assert_same, exact_twins, left_behind, norms_of, short_twins, step

import fusedres

pytestmark = pytest.mark.xdist_group("two processes")

synchronised: Any = nn.SyncBatchNorm.convert_sync_batchnorm


def sum_of_squares(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a step leaves behind by a loss that is a sum over the images."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    out = net(x)
    out.square().sum().backward()
    assert x.grad is not None
    return {"output": out.detach(), "gradient of x": x.grad, **left_behind(net)}


def in_all(left: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the gradients of parameters added up over the processes."""
    for key, value in left.items():
        if key.startswith("gradient") and key != "gradient of x":
            distributed.all_reduce(value)
    return left


def part_of(left: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return left | {key: left[key][part] for key in ("output", "gradient of x")}


def train_parts(rank: int, name: str, backend: str, sizes: tuple[int, int]) -> int:
    """Two steps by parts of a batch; raises where they aren't those by all of it, eager in one process.

    Returns:
        how many batch norms were fused.
    """
    exact, fused = exact_twins(name)
    fused = synchronised(fused)
    eager = copy.deepcopy(exact).float()
    if backend == "cpu":
        fused.float()
    part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
    torch.manual_seed(0)
    batches = images(2 * sum(sizes), dtype=torch.float64).chunk(2)
    with fusedres.backend(backend), FusedOps() as ops:
        for whole in batches:
            x = whole[part].to(fused.conv1.weight.dtype)
            found = in_all(sum_of_squares(fused, x))
            expected = part_of(sum_of_squares(exact, whole), part)
            if backend == "cpu":
                assert_as_exact(found, part_of(sum_of_squares(eager, whole.float()), part), expected)
            else:
                assert_same(found, expected)
    return ops.calls["bn_running_stats"]  # by which statistics of all processes become vectors


@pytest.mark.parametrize(
    ("name", "backend", "sizes"),
    [
        ("bottleneck", "reference", (5, 3)),
        ("torchvision basic", "reference", (4, 4)),
        ("timm basic", "reference", (2, 1)),
        ("basic", "auto", (3, 2)),
        ("torchvision basic", "cpu", (5, 3)),
    ],
)
def test_as_one_process_with_the_whole_batch(two_processes, name, backend, sizes):
    if backend == "cpu":
        pytest.importorskip("fusedres._C")
    eager, _ = exact_twins(name)
    assert two_processes(train_parts, name, backend, sizes) == [2 * norms_of(eager)] * 2


def train_checkpointed(rank: int) -> None:
    """The forward that is repeated in the backward sums again, and updates nothing."""
    eager, fused = exact_twins("torchvision bottleneck")
    fused = synchronised(fused)
    torch.manual_seed(0)
    whole, part = images(6, dtype=torch.float64), slice(3 * rank, 3 * rank + 3)
    stage: Any = fused.layer2[0]
    plain = stage.forward
    stage.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    with fusedres.backend("reference"):
        found = in_all(sum_of_squares(fused, whole[part]))
    assert_same(found, part_of(sum_of_squares(eager, whole), part))


def test_checkpointed(two_processes):
    two_processes(train_checkpointed)


def wrap_in_ddp(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        DistributedDataParallel(synchronised(short_twins("basic")[1]))
    return str(error.value)


def test_ddp_has_none_on_a_cpu(two_processes):
    assert "only work with GPU modules" in two_processes(wrap_in_ddp)[0]


def train_alone(rank: int) -> None:
    """A group of one process has its own statistics, and PyTorch's way without them is a batch norm's."""
    groups = [distributed.new_group([other]) for other in range(2)]
    eager, fused = exact_twins("basic")
    torch.manual_seed(rank)
    x = images(3, dtype=torch.float64)
    with fusedres.backend("reference"), FusedOps() as ops:
        found = step(synchronised(fused, groups[rank]), x)
    assert ops.calls["bn_running_stats"] == 0
    assert_same(found, step(eager, x))


def test_a_group_of_one(two_processes):
    two_processes(train_alone)


def call_one_by_one(rank: int) -> str:
    _, fused = short_twins("basic")
    fused = synchronised(fused)
    fused.layer1[0].bn1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as error:
        fused(images(2))
    return str(error.value)


def test_one_that_is_called_is_pytorchs(two_processes):
    """Which has none for a CPU."""
    assert "expected input tensor to be on" in two_processes(call_one_by_one)[0]


class OfAll(nn.SyncBatchNorm):
    """The same out of differentiable operators, for a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        sums = torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        mean, square = all_reduce(sums) / (2 * x.numel() // x.shape[1])
        var = square - mean.square()
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def train_a_subclass(rank: int, name: str) -> list[str]:
    nets = exact_twins(name)
    torch.manual_seed(rank)
    x = images(3, dtype=torch.float64)
    results = []
    for net in nets:
        for module in synchronised(net).modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = OfAll
        with fusedres.backend("reference"):
            results.append(step(net, x))
    assert_same(results[1], results[0])
    return [str(entry.reason) for entry in fusedres.coverage(nets[1])]


@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_a_subclass_is_called(two_processes, name):
    for reasons in two_processes(train_a_subclass, name):
        assert len(reasons) == 3 and all("the norm is a OfAll" in reason for reason in reasons)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["basic", "torchvision basic", "timm basic"])
def test_without_other_processes(name, training, reference):
    """It is a batch norm, as fused as one."""
    eager, fused = (net.train(training) for net in exact_twins(name))
    norms = norms_of(fused)
    fused = synchronised(fused)
    assert all(entry.fused for entry in fusedres.coverage(fused)) and norms_of(fused) == 0
    x = images(2, 24, torch.float64)
    with FusedOps() as ops:
        found = step(fused, x)
    assert ops.batch_norms == norms
    assert_same(found, step(eager, x))
