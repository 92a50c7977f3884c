"""torch.nn.utils.prune on convolutions and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import nn
from torch.nn.utils import prune
from twin_steps import assert_same, exact_twins, norms_of, step

import fusedres


def weights_of(net: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Conv2d)]


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "values": lambda net: prune.l1_unstructured(net.get_submodule("layer1.0.conv1"), "weight", 0.5),
    "filters": lambda net: prune.ln_structured(
        net.get_submodule("layer2.0.conv2"), "weight", 0.5, n=2, dim=0
    ),
    "of a norm": lambda net: prune.l1_unstructured(net.get_submodule("layer2.0.bn2"), "weight", 0.5),
    "everywhere": lambda net: prune.global_unstructured(
        weights_of(net), pruning_method=prune.L1Unstructured, amount=0.8
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["basic", "torchvision bottleneck", "timm basic"])
def test_as_the_eager_twin(name, way, reference):
    """Two steps with masks; then the pruned weights stay, and everything is fused again."""
    eager, fused = exact_twins(name)
    for net in (eager, fused):
        WAYS[way](net)
    assert not all(entry.fused for entry in fusedres.coverage(fused))
    x = images(2, 24, torch.float64)
    for net in (eager, fused):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        step(net, x)
        optimizer.step()
    expected = step(eager, x)
    with FusedOps() as ops:
        assert_same(step(fused, x), expected)
    convolutions = norms_of(fused) - 1  # the stem's has an op of its own
    assert ops.calls["conv_fwd"] < convolutions
    for net in (eager, fused):
        for module in net.modules():
            if not list(module.children()) and prune.is_pruned(module):
                prune.remove(module, "weight")
    with FusedOps() as ops:
        found = step(fused, x)
    assert ops.calls["conv_fwd"] == convolutions
    assert_same(found, step(eager, x))
    assert sum(int((weight == 0).sum()) for weight in fused.parameters()) >= 64
