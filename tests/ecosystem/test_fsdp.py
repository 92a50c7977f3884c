"""FSDP2, fully_shard, over two processes: each block by itself, and the rest of a net."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, nn
from twin_steps import assert_as_exact, assert_same, exact_twins, left_behind, norms_of, short_twins

import fusedres

pytest.importorskip("torch.distributed.fsdp")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

pytestmark = pytest.mark.xdist_group("two processes")


def blocks_of(net: Any) -> list[nn.Module]:
    return [block for stage in (net.layer1, net.layer2) for block in stage]


def children_of(net: Any) -> list[nn.Module]:
    return [child for block in blocks_of(net) for child in (block.conv1, block.bn2)]


UNITS = {"blocks": blocks_of, "children": children_of}


def trained(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and what three steps leave behind."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        out = net(x)
        out.double().square().mean().backward()
        optimizer.step()
    return {name: whole(value) for name, value in {"output": out, **left_behind(net)}.items()}


def whole(value: Any) -> Tensor:
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


def sharded(net: nn.Module, units: str, **policy: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for unit in UNITS[units](net):
        fully_shard(unit, mesh=mesh, **policy)
    fully_shard(net, mesh=mesh, **policy)
    assert all(hasattr(p, "full_tensor") for p in net.parameters())
    return net


def train_both(rank: int, name: str, units: str, training: bool) -> int:
    """How many batch norms were fused; raises where the net isn't as its eager twin in one process."""
    eager, fused = (net.train(training) for net in exact_twins(name))
    torch.manual_seed(0)
    x = images(dtype=torch.float64)
    expected = trained(eager, x)
    # each process updates its own running statistics, so the batch is the same where it does
    part = x if training else x.chunk(2)[rank]
    with fusedres.backend("reference"), FusedOps() as ops:
        found = trained(sharded(fused, units), part)
    if not training:
        expected["output"] = expected["output"].chunk(2)[rank]
    assert_same(found, expected)
    return ops.batch_norms


@pytest.mark.parametrize(
    ("name", "training"), [("basic", True), ("torchvision bottleneck", False), ("timm basic", True)]
)
def test_blocks_are_fused(two_processes, name, training):
    eager, _ = exact_twins(name)
    assert two_processes(train_both, name, "blocks", training) == [3 * norms_of(eager)] * 2


@pytest.mark.parametrize(("name", "fused"), [("basic", 4), ("timm basic", 1)])
def test_children_of_a_block_are_not(two_processes, name, fused):
    """Their parameters are whole in their own forward only: they are called one by one.

    The stem is fused, and in our blocks and torchvision's a batch norm that isn't sharded by itself.
    """
    assert two_processes(train_both, name, "children", False) == [3 * fused] * 2


def train_in_16_bits(rank: int) -> None:
    """As far from float64 as eager under autocast is; by this policy PyTorch's batch norm raises on a CPU."""
    eager, fused = short_twins("basic")
    exact, x = copy.deepcopy(eager).double(), images()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    eager.forward = torch.autocast("cpu", torch.bfloat16)(eager.forward)
    expected = trained(eager, x)
    with fusedres.backend("reference"), FusedOps() as ops:
        found = trained(sharded(fused, "blocks", mp_policy=policy), x)
    assert ops.batch_norms == 3 * norms_of(fused) and found["output"].dtype == torch.bfloat16
    assert_as_exact(found, expected, trained(exact, x.double()))


def test_mixed_precision(two_processes):
    two_processes(train_in_16_bits)
