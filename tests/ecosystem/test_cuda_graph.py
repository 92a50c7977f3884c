"""A training step asks the device for nothing, so that a CUDA graph can hold it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedres
from fusedres import kernels


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the choice of an implementation asks a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(kernels, "unavailable", lambda: {})
    fusedres.ops.choice.cache_clear()
    yield
    fusedres.ops.choice.cache_clear()


def step(net: nn.Module, x: Any) -> None:
    nn.functional.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NETS)
def test_no_value_is_read(h100, name, device):
    """Fake tensors have no values: asking for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device(device):
            _, net = twins(name)
        x = mode.from_tensor(images()).to(device)
        with fusedres.backend("triton" if device == "cuda" else "reference"), FusedOps() as ops:
            step(net, x)
    assert ops.names["conv_wgrad"] > 0 and ops.names["bn_update_running_"] > 0
    assert all(p.grad.device.type == device for p in net.parameters())


def test_an_average_over_all_batches_reads_their_number(h100):
    """momentum=None, as in PyTorch's own BatchNorm2d."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        nets = twins("basic")
        for net in nets:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            with pytest.raises(RuntimeError, match="item|data-dependent|fake"), fusedres.backend("reference"):
                step(net, mode.from_tensor(images()))


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
