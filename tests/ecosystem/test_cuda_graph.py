"""A training step asks the device for nothing, so that a CUDA graph can hold it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from fusedres.nn import fuse


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
def test_no_value_is_read(fused_by, monkeypatch, name):
    """Fake tensors have no values: asking for one raises. The nets would leave them to PyTorch."""
    plain = (Tensor, nn.Parameter, FakeTensor)
    monkeypatch.setattr(fuse, "_PLAIN", plain)
    monkeypatch.setattr(fuse, "_PLAIN_OR_NONE", (*plain, type(None)))
    mode = FakeTensorMode()
    net = faked(twins(name)[1], mode)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    x = mode.from_tensor(images())
    with mode, FusedOps() as ops:
        step(net, x)
    assert ops.batch_norms == ops.names["bn_update_running_"] == norms
    assert all(p.grad is not None for p in net.parameters())


def test_a_value_that_is_read_raises(monkeypatch):
    """The count of all batches, by momentum=None, as PyTorch's own BatchNorm2d reads it."""
    mode = FakeTensorMode()
    norm = faked(nn.BatchNorm2d(8, momentum=None), mode)
    x = mode.from_tensor(torch.randn(2, 8, 4, 4))
    for call in (norm, lambda x: fuse.batch_norm_of(norm)):
        with mode, pytest.raises(DataDependentOutputException):
            call(x)


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
