"""torch.export: a graph of ATen's operators alone, which needs no fusedres; and AOTInductor's package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from torch import nn

import fusedres

LOADS = """
import sys, torch
x, expected = torch.load(sys.argv[1] + "/data.pt")
net = torch.export.load(sys.argv[1] + "/model.pt2").module()
assert (net(x) - expected).norm() <= 1e-4 * expected.norm()
assert not any(name.split(".")[0] == "fusedres" for name in sys.modules)
"""


def exported(net: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(net, (images(),), dynamic_shapes=({0: batch},))


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_a_graph_of_aten_alone(fused_by, name, training):
    """Statistics are updated by it, too, and gradients go through."""
    eager, fused = (net.train(training) for net in twins(name))
    program = exported(fused)
    assert namespaces(program) == {"aten"}
    again = program.module()
    for x in (images(), images(7)):
        torch.testing.assert_close(again(x), eager(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(again.named_buffers()), dict(eager.named_buffers()))
    x = images(3)
    for net in (again, eager):
        net(x).square().mean().backward()
    gradients = dict(eager.named_parameters())
    for key, p in again.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key].grad, rtol=1e-3, atol=1e-5)


def test_loaded_without_this_package(tmp_path):
    """For a batch of another size."""
    eager, fused = (net.eval() for net in twins("bottleneck"))
    torch.export.save(exported(fused), tmp_path / "model.pt2")
    x = images(7)
    torch.save((x, eager(x).detach()), tmp_path / "data.pt")
    script = tmp_path / "load.py"
    script.write_text(LOADS)
    command = [sys.executable, script, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


class Op(nn.Module):
    """A graph that has ops of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn
        return fusedres.functional.bn_act(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, training=False
        )


def test_a_graph_of_our_ops(fused_by, tmp_path):
    """Whoever loads it imports fusedres."""
    net = Op().eval()
    nn.init.normal_(net.bn.running_mean)
    x = torch.randn(4, 8, 6, 5)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert "fusedres" in namespaces(program)
    torch.export.save(program, tmp_path / "model.pt2")
    y = torch.randn(3, 8, 6, 5)
    with torch.no_grad():  # an op by itself has no derivative
        found = torch.export.load(tmp_path / "model.pt2").module()(y)
    torch.testing.assert_close(found, torch.relu(net.bn(y)))


@pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")
def test_aot_inductor(tmp_path):
    """A compiled stage."""
    eager, fused = (net.eval().layer2 for net in twins("torchvision basic"))
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(fused, (torch.randn(4, 64, 8, 8),), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
        x = torch.randn(7, 64, 8, 8)
        found = torch._inductor.aoti_load_package(package)(x)
        torch.testing.assert_close(found, eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="compiles C++")
def test_aot_inductor_with_our_ops(tmp_path):
    pytest.importorskip("fusedres._C")
    net = Op().eval()
    x = torch.randn(4, 8, 6, 5)
    with torch.no_grad(), fusedres.backend("cpu"):
        program = torch.export.export(net, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "op.pt2"))
        found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found, torch.relu(net.bn(x)))
