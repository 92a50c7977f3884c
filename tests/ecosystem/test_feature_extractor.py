"""torch.fx, torchvision's feature extractor and torch.jit see the children, as of an eager net."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from torch import nn

CHANNELS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


@pytest.fixture
def extraction() -> Any:
    pytest.importorskip("torchvision")
    return importlib.import_module("torchvision.models.feature_extraction")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_feature_extractor(fused_by, extraction, name, training):
    """The nodes that the eager net has, with its values; trained through, too."""
    eager, fused = (net.train(training) for net in twins(name))
    stages = {f"layer{i}": f"c{i + 1}" for i in range(1, 5)}
    extractor = extraction.create_feature_extractor(fused, stages)
    hooked: dict[str, Any] = {}
    for layer, key in stages.items():
        eager.get_submodule(layer).register_forward_hook(
            lambda module, given, out, key=key: hooked.__setitem__(key, out)
        )
    x = images()
    found = extractor(x)
    eager(x)
    assert [out.shape[1] for out in found.values()] == CHANNELS[name.split()[-1]]
    torch.testing.assert_close(found, hooked)
    for out in (found, hooked):
        sum(stage.square().mean() for stage in out.values()).backward()
    gradients = dict(eager.named_parameters())
    for key, p in extractor.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NETS if " " in name])
def test_node_names(extraction, name):
    """Of a converted net: the library's own, so that scripts which name nodes go on working."""
    eager, fused = twins(name)
    theirs, ours = (extraction.get_graph_node_names(net) for net in (eager, fused))
    if name.startswith("torchvision"):
        assert [sorted(nodes) for nodes in ours] == [sorted(nodes) for nodes in theirs]
    layers = {"layer1.0.bn1", "layer3.0.conv2", "layer4", "global_pool" if "timm" in name else "avgpool"}
    for nodes in (*theirs, *ours):
        assert {n for n in layers if any(node.startswith(n) for node in nodes)} == layers


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:.*TorchScript type system", "ignore:.*torch.jit", "ignore:`torch.jit")
def test_traced_and_scripted(fused_by, name):
    eager, fused = (net.eval() for net in twins(name))
    x, other = images(), images(2, 48)
    graph = torch.fx.symbolic_trace(fused)
    children = {name for name, module in eager.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert children <= {node.target for node in graph.graph.nodes if node.op == "call_module"}
    for net in (graph, torch.jit.trace(fused, x), torch.jit.script(fused)):
        with FusedOps() as ops, torch.no_grad():
            for given in (x, other):
                torch.testing.assert_close(net(given), eager(given), rtol=1e-4, atol=1e-5)
        assert not ops.names
