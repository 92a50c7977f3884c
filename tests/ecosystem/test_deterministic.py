"""torch.use_deterministic_algorithms: nothing of ours is refused, and a step gives the same bits twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from ecosystem_nets import images, twins
from fused_ops import FusedOps
from torch import Tensor, nn


@pytest.fixture
def deterministic() -> Iterator[None]:
    """An operator without a deterministic way raises; memory that nobody wrote is NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def steps(net: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses, gradients, parameters and statistics of two training steps."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(net(images()), torch.arange(4))
        loss.backward()
        found[f"loss {step}"] = loss.detach().clone()
        optimizer.step()
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return found | net.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["basic", "torchvision bottleneck", "timm basic"])
def test_the_same_bits_twice(fused_by, deterministic, name, dtype):
    eager, fused = twins(name)
    other = copy.deepcopy(fused)
    with FusedOps() as ops:
        first = steps(fused, dtype)
    assert ops.names
    second = steps(other, dtype)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) and value.isfinite().all(), key
    expected = steps(eager, dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(first["loss 1"], expected["loss 1"], rtol=tolerance, atol=tolerance)
