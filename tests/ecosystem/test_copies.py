"""Copies of a net: deep ones, pickled, saved, averaged, loaded, and shared with other processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from safetensors.torch import load, save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from twin_steps import assert_same, exact_twins, norms_of, step


def saved_and_loaded(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def through_another_process(net: nn.Module) -> nn.Module:
    """As torch.multiprocessing sends it: its parameters stay where they are."""
    sent: nn.Module = pickle.loads(ForkingPickler.dumps(net.share_memory()))
    first, second = next(net.parameters()), next(sent.parameters())
    assert second.is_shared()
    with torch.no_grad():
        first.add_(1)
        assert torch.equal(first, second)
        second.sub_(1)
    return sent


def loaded_into_another(state_of: Callable[[nn.Module], Any], **arguments: Any) -> Any:
    def copied(net: nn.Module) -> nn.Module:
        other = copy.deepcopy(net)
        for value in other.state_dict().values():
            value.zero_()
        other.load_state_dict(state_of(net), **arguments)
        return other

    return copied


def by_safetensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return load(save(net.state_dict()))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved_and_loaded,
    "another process": through_another_process,
    "state_dict": loaded_into_another(lambda net: net.state_dict()),
    "state_dict, assigned": loaded_into_another(
        lambda net: {key: value.clone() for key, value in net.state_dict().items()}, assign=True
    ),
    "safetensors": loaded_into_another(by_safetensors),
    "averaged": lambda net: AveragedModel(net, use_buffers=True).module,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["basic", "torchvision bottleneck", "timm basic"])
def test_a_copy_is_the_net(name, way, reference):
    eager, fused = exact_twins(name)
    twin = COPIES[way](fused)
    assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()]
    x = images(dtype=torch.float64)
    with FusedOps() as ops:
        found = step(twin, x)
    assert ops.batch_norms == norms_of(fused)
    assert_same(found, step(eager, x))


@pytest.mark.parametrize("name", ["torchvision basic", "timm basic"])
def test_files_load_both_ways(name, reference):
    eager, fused = exact_twins(name)
    for source, target, arguments in ((fused, eager, {}), (eager, fused, {"assign": True})):
        step(source, images(dtype=torch.float64))
        target.load_state_dict(by_safetensors(source), **arguments)
        assert_same(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    x = images(dtype=torch.float64)
    assert_same(step(fused, x), step(eager, x))


def by_timm(version: str, **arguments: Any) -> Any:
    return lambda net: getattr(pytest.importorskip("timm").utils, version)(net, decay=0.9, **arguments)


def by_torch(net: nn.Module) -> AveragedModel:
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


AVERAGES = {
    "torch": (by_torch, "update_parameters"),
    "timm V2": (by_timm("ModelEmaV2"), "update"),
    "timm V3": (by_timm("ModelEmaV3", foreach=True), "update"),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_averages_while_training(name, average, reference):
    """Of parameters and statistics; the average is a net as fused as its source."""
    make, update = AVERAGES[average]
    batches = [images(dtype=torch.float64) for _ in range(3)]
    results = []
    for net in exact_twins(name):
        averaged = make(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            getattr(averaged, update)(net)
        with FusedOps() as ops, torch.no_grad():
            out = averaged.eval()(batches[0])
        results.append({"output": out, **averaged.module.state_dict()})
    assert ops.calls["bn_running_stats"] == norms_of(net)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("name", ["bottleneck", "torchvision basic", "timm basic"])
def test_update_bn(name, reference):
    """Statistics of an averaged net: by a pass over the data, each batch with the same weight."""
    batches = [images(dtype=torch.float64) for _ in range(3)]
    eager, fused = (AveragedModel(net) for net in exact_twins(name))
    update_bn(batches, eager)
    with FusedOps() as ops:
        update_bn(batches, fused)
    assert ops.calls["bn_update_running_"] == 3 * norms_of(fused)
    assert_same(fused.state_dict(), eager.state_dict())
