"""Nets on the meta device: made there, filled later, and run there for their shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ecosystem_nets import CLASSES, images
from fused_ops import FusedOps
from torch import nn
from twin_steps import assert_same, exact_twins, norms_of, short_twins, step

import fusedres


def made_on_meta(name: str) -> nn.Module:
    """The fused net, without values from the start."""
    with torch.device("meta"):
        _, fused = short_twins(name)
    assert all(t.is_meta for t in fused.state_dict().values())
    return fused


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("name", ["basic", "torchvision bottleneck", "timm basic"])
def test_filled_later(name, assign, reference):
    eager, _ = exact_twins(name)
    fused = made_on_meta(name)
    if not assign:
        fused.to_empty(device="cpu").double()
    state = {key: value.clone() for key, value in eager.state_dict().items()}
    fused.load_state_dict(state, assign=assign)
    x = images(2, 32, torch.float64)
    with FusedOps() as ops:
        found = step(fused, x)
    assert ops.batch_norms == norms_of(fused)
    assert_same(found, step(eager, x))


def test_converted_there():
    models: Any = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        net = models.resnet50()
    assert all(entry.fused for entry in fusedres.coverage(fusedres.convert(net, strict=True)))
    assert all(t.is_meta for t in fusedres.revert(net).state_dict().values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["basic", "torchvision bottleneck", "timm basic"])
def test_shapes(name, training, reference):
    """Of the output and all gradients; a stage's output is laid out as on a GPU."""
    fused = made_on_meta(name).train(training)
    stage: list[torch.Tensor] = []
    fused.get_submodule("layer2").register_forward_hook(lambda *call: stage.append(call[-1]))
    for x in (images(3, 40), images(2, 33).to(memory_format=torch.channels_last)):
        with FusedOps() as ops:
            found = step(fused, x.to("meta"))
        assert ops.calls["bn_act"] == 2
        assert found["output"].shape == (len(x), CLASSES) and found["gradient of x"].shape == x.shape
        for key, p in fused.named_parameters():
            assert found[f"gradient of {key}"].shape == p.shape and p.grad.is_meta
        assert stage.pop().is_contiguous(memory_format=torch.channels_last)
