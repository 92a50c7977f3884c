"""Activation checkpointing: gradients are eager's, and a repeated forward leaves the statistics alone."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, checkpoint_sequential
from twin_steps import assert_same, exact_twins, norms_of, step

import fusedres
from fusedres.nn import BasicBlock, Bottleneck

both_modes = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


@both_modes
@pytest.mark.parametrize("momentum", [0.1, None], ids=["0.1", "cumulative"])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_statistics_are_updated_once(block, backend, momentum, reentrant):
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


@pytest.mark.parametrize("name", NETS)
def test_a_whole_net(name, reference):
    eager, fused = exact_twins(name)
    x = images(dtype=torch.float64)
    with FusedOps() as ops:
        found = step(fused, x, lambda net, x: checkpoint(net, x, use_reentrant="timm" in name))
    assert ops.batch_norms == 2 * norms_of(fused)
    assert_same(found, step(eager, x))


def in_segments(net: Any, x: Tensor, reentrant: bool) -> Tensor:
    stem = nn.Sequential(*list(net.children())[:4])
    stages = nn.Sequential(net.layer1, net.layer2)
    x = checkpoint_sequential(stages, 2, stem(x), use_reentrant=reentrant)
    return net.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@both_modes
def test_checkpoint_sequential(reentrant, reference):
    eager, fused = exact_twins("torchvision basic")
    x = images(dtype=torch.float64)
    with FusedOps() as ops:
        found = step(fused, x, functools.partial(in_segments, reentrant=reentrant))
    assert ops.calls["bn_act"] == 2 + 1, "all but the last segment are computed twice"
    assert_same(found, step(eager, x))


def convolutions_kept(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in (torch.ops.fusedres.conv_fwd.default, torch.ops.fusedres.bn_stats.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_selective(name, backend):
    """Convolutions and statistics are kept, the rest is computed again."""
    eager, fused = exact_twins(name)
    x = images(dtype=torch.float64)
    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, convolutions_kept)
    with fusedres.backend(backend), FusedOps() as ops:
        found = step(fused, x, lambda net, x: checkpoint(net, x, use_reentrant=False, context_fn=contexts))
    if backend == "reference":
        assert ops.batch_norms == norms_of(fused) and ops.calls["bn_act"] == 2 * 2
    assert_same(found, step(eager, x))


@pytest.mark.parametrize("name", ["timm basic", "timm bottleneck"])
def test_timms_own(name, reference):
    eager, fused = exact_twins(name)
    x = images(dtype=torch.float64)
    expected = step(eager, x)
    fused.set_grad_checkpointing()
    with FusedOps() as ops:
        assert_same(step(fused, x), expected)
    assert ops.batch_norms == 2 * norms_of(fused) - 1, "all but the stem are computed twice"
