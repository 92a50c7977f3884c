"""Threads: of Python, at once, and those of PyTorch, more and fewer between calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, nn
from twin_steps import assert_same, exact_twins, left_behind, norms_of, short_twins

AT_ONCE = 4


@pytest.fixture
def as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["bottleneck", "torchvision basic", "timm basic"])
def test_inference_from_many(name, fused_by):
    """A net, other inputs in each thread, half of them under autocast: the same bits as one by one."""
    _, fused = short_twins(name)
    fused.eval()
    batches = [images(2, 32) for _ in range(16)]
    together = threading.Barrier(AT_ONCE)

    def answer(i: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
            return fused(batches[i])  # type: ignore[no-any-return]

    def answer_at_once(i: int) -> Tensor:
        together.wait(60)
        return answer(i)

    with FusedOps() as ops:
        for i in range(16):
            answer(i)
    assert ops.calls["bn_running_stats"] == 16 * norms_of(fused)
    expected = [answer(i) for i in range(16)]  # under a mode PyTorch takes other ways, and rounds otherwise
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(answer_at_once, range(16)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def trained(net: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return left_behind(net)


@pytest.mark.parametrize("name", ["bottleneck", "torchvision basic", "timm basic"])
def test_two_nets_are_trained_at_once(name, reference):
    batches = [images(2, 32, torch.float64) for _ in range(3)]
    nets, twins = ([exact_twins(name)[part] for _ in range(2)] for part in (1, 0))
    expected = [trained(twin, batches[i:]) for i, twin in enumerate(twins)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(trained, nets, (batches, batches[1:])))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_a_backward_in_another_thread(reference):
    eager, fused = exact_twins("torchvision basic")
    x = images(2, 32, torch.float64)
    for net in (eager, fused):
        loss = net(x).square().mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert_same(left_behind(fused), left_behind(eager))


@pytest.mark.parametrize("name", ["bottleneck", "timm basic"])
def test_of_pytorch(name, fused_by, as_many_threads_as_before):
    x, (eager, _) = images(2, 32), short_twins(name)
    expected = trained(eager, [x])
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        _, fused = short_twins(name)
        found = trained(fused, [x])
        assert_same(found, expected, rtol=1e-3, atol=1e-4)
