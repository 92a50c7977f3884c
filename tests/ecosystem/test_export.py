"""torch.export: a graph of ATen's operators alone, which needs no fusedres; and AOTInductor's package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from torch import nn

import fusedres

LOADS = """
import sys, torch
x, expected = torch.load("data.pt")
net = torch.export.load("model.pt2").module()
assert (net(x) - expected).norm() <= 1e-4 * expected.norm()
assert not any(name.split(".")[0] == "fusedres" for name in sys.modules)
"""

OURS = """
import {packages}
x, expected = torch.load("data.pt")
torch.set_grad_enabled(False)
torch.testing.assert_close({load}(x), expected)
"""


def in_another_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


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
    result = in_another_process(LOADS, tmp_path)
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
    """For a batch of another size."""
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
def test_who_loads_our_ops_imports_this_package(tmp_path):
    """A program and a package of AOTInductor that have them, in another process."""
    pytest.importorskip("fusedres._C")
    net = Op().eval()
    x = torch.randn(4, 8, 6, 5)
    with torch.no_grad(), fusedres.backend("cpu"):
        program = torch.export.export(net, (x,))
        torch.export.save(program, tmp_path / "program.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    torch.save((x, torch.relu(net.bn(x)).detach()), tmp_path / "data.pt")
    for load, refusal in (
        ("torch.export.load('program.pt2').module()", "deserializ"),
        ("torch._inductor.aoti_load_package('package.pt2')", "find schema for fusedres::"),
    ):
        result = in_another_process(OURS.format(packages="torch, fusedres", load=load), tmp_path)
        assert result.returncode == 0, result.stderr
        result = in_another_process(OURS.format(packages="torch", load=load), tmp_path)
        assert result.returncode == 1 and refusal in result.stderr, result.stderr
