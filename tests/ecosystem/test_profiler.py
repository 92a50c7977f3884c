"""torch.profiler shows the fused blocks and their ops, forward and backward, under names one can read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from torch import nn
from torch.profiler import ProfilerActivity, profile


def profiled(net: nn.Module, **settings: bool) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU], **settings) as seen:
        net(images()).sum().backward()
    return Counter(event.name for event in seen.events())


@pytest.mark.parametrize("name", NETS)
def test_names(fused_by, name):
    _, net = twins(name)
    with FusedOps() as ops:
        net(images()).sum().backward()
    seen = profiled(net)
    assert {key: n for key, n in seen.items() if key.startswith("fusedres::")} == {
        f"fusedres::{op}": n for op, n in ops.names.items()
    }
    block = "FusedBottleneck" if "bottleneck" in name else "FusedBasicBlock"
    assert seen[block] == seen[f"{block}Backward"] == 4
    assert seen["BNReluMaxPool"] == seen["BNReluMaxPoolBackward"] == 1
    assert (seen["StemConv"], seen["StemConvBackward"]) == ((1, 1) if fused_by == "reference" else (0, 0))


def test_modules(fused_by):
    """With stacks, every call of a block is under the name of its module."""
    _, net = twins("bottleneck")
    seen = profiled(net, with_stack=True)
    assert {f"nn.Module: Bottleneck_{i}" for i in range(4)} <= set(seen)
    assert seen["nn.Module: SmallBottleneck_0"] == 1


def test_nothing_is_recorded_without_a_profiler(fused_by, monkeypatch):
    """No range of ours is entered: what a profile shows PyTorch records by itself."""
    _, net = twins("basic")

    def entered(self: object) -> None:
        raise AssertionError("a record_function")

    monkeypatch.setattr(torch.profiler.record_function, "__enter__", entered)
    net(images()).sum().backward()
