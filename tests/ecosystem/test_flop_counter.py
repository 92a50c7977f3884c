"""torch.utils.flop_counter counts the convolutions that a fused net runs, as for an eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_case import KINDS, ChainCase, call, eager
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fusedres import ops
from fusedres.functional import BatchNorm, ConvNorm, stem
from fusedres.ops import flops  # noqa: F401, registers the formulas

OPS = torch.ops.fusedres


def count(run: Any) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter


def by_module(net: nn.Module) -> dict[str, int]:
    with torch.no_grad():
        counts = count(lambda: net(images())).get_flop_counts()
    own = type(net).__name__
    return {name.removeprefix(own): sum(of_ops.values()) for name, of_ops in counts.items()}


@pytest.mark.parametrize("name", NETS)
def test_nets(fused_by, name):
    """In all, and by module: the counter's hooks make the nets run child by child."""
    eager, fused = twins(name)
    found, expected = (count(lambda net=net: net(images()).sum().backward()) for net in (fused, eager))
    assert dict(found.get_flop_counts()["Global"]) == dict(expected.get_flop_counts()["Global"])
    assert by_module(fused) == by_module(eager)
    assert by_module(fused)[".layer1.0.conv1"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks(fused_by, kind):
    case = ChainCase(kind, torch.float32)
    with FusedOps() as called:
        fused = count(lambda: case.run(call))
    assert ("conv_dgrad" in called.names) == (fused_by == "reference")
    assert fused.get_total_flops() == count(lambda: case.run(eager)).get_total_flops() > 0


def test_the_stem(fused_by):
    weight, x = torch.randn(16, 3, 7, 7, requires_grad=True), images()
    norm = BatchNorm(None, None, None, None, True)
    with FusedOps() as called:
        fused = count(lambda: stem(x, ConvNorm(weight, norm, 2)).sum().backward())
    assert ("stem_wgrad" in called.names) == (fused_by == "reference")
    eager = count(lambda: F.conv2d(x, weight, None, 2, 3).sum().backward())
    assert fused.get_total_flops() == eager.get_total_flops() > 0


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_trained_nets_convolution(side, stride):
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(16, 8, side, side)
    fused = count(lambda: OPS.conv_bias_act(x, weight, None, None, True, stride))
    eager = count(lambda: F.conv2d(x, weight, None, stride, side // 2))
    assert fused.get_total_flops() == eager.get_total_flops() > 0


def test_a_whole_block():
    x = torch.randn(2, 8, 9, 7)
    weights = [torch.randn(16, 8, 1, 1), torch.randn(16, 16, 3, 3), torch.randn(8, 16, 1, 1)]
    biases = [torch.randn(16), torch.randn(16), torch.randn(8)]

    def eager():
        t = x
        for weight, bias in zip(weights, biases, strict=True):
            t = F.conv2d(t, weight, bias, padding=weight.shape[2] // 2)

    whole = [t for pair in zip(weights, biases, strict=True) for t in pair]
    fused = count(lambda: OPS.bottleneck_infer(x, *whole))
    assert fused.get_total_flops() == count(eager).get_total_flops() > 0


def test_an_8_bit_convolution():
    levels = torch.zeros(2, 16, 9, 7, dtype=torch.int8)
    weight, vectors = levels.new_zeros(32, 16, 3, 3), torch.zeros(2, 32)
    given = (levels, levels[0, :, 0, 0].clone(), weight, vectors[0].int(), *vectors, None, 0.0, 0.0, 2)
    fused = count(lambda: OPS.conv_int8(*given, torch.int8))
    eager = count(lambda: F.conv2d(levels.float(), weight.float(), None, 2, 1))
    assert fused.get_total_flops() == eager.get_total_flops() > 0


def test_every_convolution_has_a_formula():
    convolutions = {name for name in ops.OPS if name.startswith(("conv_", "stem_", "bottleneck_"))}
    assert {str(op) for op in flop_registry if str(op).startswith("fusedres.")} == {
        f"fusedres.{name}" for name in convolutions
    }
