"""torch.compile: one graph for every step and batch size, with eager's results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from chain_case import FLIPPED
from ecosystem_nets import images, twins
from torch import Tensor, nn

import fusedres

BATCHES = {"static": (4, 4, 4), "dynamic": (4, 4, 6, 5)}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Compiling again is an error; small inputs are fused, too."""
    pytest.importorskip("fusedres._C")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), fusedres.backend("cpu"):
        yield
    torch._dynamo.reset()


def calls(graph_modules: list[torch.fx.GraphModule], op: str) -> int:
    return sum(
        op in str(node.target)
        for top in graph_modules
        for module in top.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    )


def trained_alike(
    compiled: Any, fused: nn.Module, eager: nn.Module, inputs: list[Tensor], tolerance: float = 1e-2
) -> None:
    """Every step's loss, gradients and statistics are eager's, the optimizer's steps in between."""
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in (fused, eager)]
    for x in inputs:
        losses = [net(x).square().mean() for net in (compiled, eager)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-5)
        for (key, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
            error = (p.grad - q.grad).norm()
            assert error <= FLIPPED * q.grad.norm() + 1e-6, f"{key} is off by {error}"
        torch.testing.assert_close(
            dict(fused.named_buffers()), dict(eager.named_buffers()), rtol=1e-2, atol=1e-3
        )
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    ("name", "shapes", "training"),
    [
        ("basic", "static", True),
        ("torchvision bottleneck", "dynamic", True),
        ("timm basic", "dynamic", False),
    ],
)
def test_one_graph(name, shapes, training):
    """In fp64: what a ReLU makes of rounding isn't looked at."""
    eager, fused = (net.double().train(training) for net in twins(name))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    with fusedres.backend("reference"):
        compiled = torch.compile(fused, backend=keep, fullgraph=True, dynamic=shapes == "dynamic")
        trained_alike(compiled, fused, eager, [images(n).double() for n in BATCHES[shapes]], 1e-6)
    assert len(graphs) == 1
    if not name.startswith("timm"):
        assert calls(graphs, "fusedres.bn_act") > 0
    assert calls(graphs, "fusedres.conv") == 0, "convolutions are PyTorch's"


def stages() -> list[nn.Module]:
    """A block with a projection, eager and fused."""
    return [net.layer2 for net in twins("torchvision basic")]


def test_aot_autograd(fused_by):
    """The backward is traced as well, for sizes that aren't known yet."""
    eager, fused = stages()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    trained_alike(compiled, fused, eager, [torch.randn(n, 64, 8, 8) for n in BATCHES["dynamic"]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_gradients(fused_by):
    eager, fused = (stage.eval() for stage in stages())
    compiled = torch.compile(fused, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (2, 5):
            x = torch.randn(n, 64, 8, 8)
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)


def test_inductor():
    """As code that inductor generates."""
    pytest.importorskip("fusedres._C")
    eager, fused = stages()
    with fusedres.backend("cpu"):
        compiled = torch.compile(fused, fullgraph=True, dynamic=True)
        trained_alike(compiled, fused, eager, [torch.randn(n, 64, 8, 8) for n in BATCHES["dynamic"]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
