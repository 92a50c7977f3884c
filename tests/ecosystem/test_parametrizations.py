"""torch.nn.utils.parametrizations on convolutions and norms: such a block's children are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from twin_steps import assert_same, exact_twins, norms_of, step

import fusedres


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda net: parametrizations.weight_norm(net.get_submodule("layer1.0.conv1")),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net.get_submodule("layer1.0.conv2")),
    "orthogonal": lambda net: parametrizations.orthogonal(net.get_submodule("layer2.0.downsample.0")),
    "of a norm": lambda net: parametrize.register_parametrization(
        net.get_submodule("layer2.0.bn1"), "weight", Positive()
    ),
    "of the stem": lambda net: parametrizations.weight_norm(net.get_submodule("conv1")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["basic", "torchvision basic", "timm bottleneck"])
def test_as_the_eager_twin(name, way, reference):
    """Two steps; then the weights stay what they are, and everything is fused again."""
    eager, fused = exact_twins(name)
    for net in (eager, fused):
        torch.manual_seed(0)  # of spectral_norm's vectors and orthogonal's base
        WAYS[way](net)
    unfused = [entry.name for entry in fusedres.coverage(fused) if not entry.fused]
    assert len(unfused) == 1
    x = images(2, 24, torch.float64)
    for net in (eager, fused):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        step(net, x)
        optimizer.step()
    expected = step(eager, x)
    with FusedOps() as ops:
        assert_same(step(fused, x), expected)
    convolutions = norms_of(fused) - 1  # the stem's has an op of its own
    assert way == "of the stem" or 0 < ops.calls["conv_fwd"] < convolutions
    for net in (eager, fused):
        for module in list(net.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, next(iter(module.parametrizations)))
    with FusedOps() as ops:
        found = step(fused, x)
    assert ops.calls["conv_fwd"] == convolutions
    assert_same(found, step(eager, x))
