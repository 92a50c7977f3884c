"""Activation checkpointing: a forward that is repeated leaves the running statistics alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.nn import BasicBlock, Bottleneck


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["0.1", "cumulative"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_statistics_are_updated_once(block, backend, momentum, reentrant):
    torch.manual_seed(0)
    one = block(8 * block.expansion, 8)
    for module in one.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    two = copy.deepcopy(one)
    if backend == "cpu":
        pytest.importorskip("fusedres._C")
    with fusedres.backend(backend):
        for _ in range(2):
            x = torch.randn(4, 8 * block.expansion, 6, 6, requires_grad=True)
            y = x.detach().clone().requires_grad_()
            one(x).square().sum().backward()
            checkpoint(two, y, use_reentrant=reentrant).square().sum().backward()
            torch.testing.assert_close(y.grad, x.grad)
    for (name, expected), (_, found) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    assert one.bn1.num_batches_tracked == 2
