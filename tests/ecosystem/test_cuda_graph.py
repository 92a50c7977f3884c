"""A training step asks the device for nothing, so that a CUDA graph can hold it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedres


def step(net: nn.Module, x: Any) -> None:
    nn.functional.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()


def faked(net: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The net without values."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()))
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else mode.from_tensor(b)
    return net


@pytest.mark.parametrize("name", NETS)
def test_no_value_is_read(name):
    """Fake tensors have no values: asking for one raises."""
    mode = FakeTensorMode()
    net = faked(twins(name)[1], mode)
    x = mode.from_tensor(images())
    with mode, fusedres.backend("reference"):
        step(net, x)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
def test_replays(name):
    """A captured step, replayed on other images, leaves the gradients and statistics of an eager one."""
    _, net = twins(name)
    net = net.cuda().to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    x = images().cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, x)
    torch.cuda.synchronize()
    state = copy.deepcopy(other.state_dict())
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(net, x)
    net.load_state_dict(state)
    for _ in range(3):
        x.copy_(images())
        graph.replay()
        other.zero_grad()
        step(other, x)
        gradients = {key: p.grad for key, p in other.named_parameters()}
        for key, p in net.named_parameters():
            torch.testing.assert_close(p.grad, gradients[key], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))
