"""Which blocks run as one autograd Function, and that the others give what their children give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_ops import FusedOps
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.nn import BasicBlock, Bottleneck, PadShortcut, PlainBlock, unfused_block_reason


def projection(inplanes: int, planes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


BLOCKS = {
    "basic": lambda: BasicBlock(8, 16, 2, projection(8, 16)),
    "bottleneck": lambda: Bottleneck(8, 4, 2, projection(8, 16)),
    "padded": lambda: BasicBlock(8, 16, 2, PadShortcut(8, 16, 2)),
    "plain": lambda: PlainBlock(8, 8),
}


class OtherConv(nn.Conv2d):
    """A subclass may do anything."""


def replaced(name: str, child: nn.Module) -> Any:
    return lambda block: block.__setattr__(name, child)


def patched(block: nn.Module) -> None:
    forward = block.conv2.forward
    block.conv2.forward = lambda x: forward(x)


ALTERATIONS = {
    "a forward hook": (lambda b: b.conv1.register_forward_hook(lambda *_: None), "a convolution has a hook"),
    "a full-backward hook": (
        lambda b: b.bn1.register_full_backward_hook(lambda *_: None),
        "the norm has a hook",
    ),
    "a full-backward hook of the activation": (
        lambda b: b.relu.register_full_backward_hook(lambda *_: None),
        "the activation has a hook",
    ),
    "a patched forward": (patched, "a convolution has a forward of its own"),
    "another activation": (replaced("relu", nn.SiLU()), "the activation is a SiLU"),
    "another norm": (replaced("bn1", nn.GroupNorm(2, 16)), "the norm is a GroupNorm"),
    "another convolution": (replaced("conv2", OtherConv(16, 16, 3, 1, 1)), "a convolution is a OtherConv"),
    "a bias": (replaced("conv2", nn.Conv2d(16, 16, 3, 1, 1)), "a convolution has a bias"),
    "reflecting borders": (
        replaced("conv2", nn.Conv2d(16, 16, 3, 1, 1, bias=False, padding_mode="reflect")),
        "padded with zeros",
    ),
    "no padding": (replaced("conv2", nn.Conv2d(16, 16, 5, 1, 2, dilation=1, bias=True)), "has a bias"),
    "a parametrization": (lambda b: parametrizations.weight_norm(b.conv1), "Conv2d, not an nn.Conv2d|plain"),
    "pruned": (lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5), "has a hook"),
    "a hook of the shortcut": (
        lambda b: b.downsample.register_forward_hook(lambda *_: None),
        "the shortcut has a hook",
    ),
    "another shortcut": (
        replaced("downsample", nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))),
        "the shortcut is not a convolution and a norm: Sequential",
    ),
}


def chained(block: nn.Module, x: torch.Tensor) -> bool:
    with fusedres.backend("reference"):
        return "Fused" in type(block(x.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_function(name):
    block = BLOCKS[name]()
    assert unfused_block_reason(block) is None
    assert chained(block, torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_children_are_called(name):
    alter, reason = ALTERATIONS[name]
    block = BLOCKS["basic"]()
    block.relu.inplace = False  # what a backward hook hands on can't be written over
    alter(block)
    why = unfused_block_reason(block)
    assert why is not None
    assert any(part in why for part in reason.split("|")), why
    x = torch.randn(2, 8, 6, 6)
    assert not chained(block, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_one_batch_norm_in_eval_mode(name):
    """It uses its running statistics and leaves them alone; the block stays fused."""
    ours = BLOCKS[name]()
    ours.bn1.running_mean.normal_()
    ours.bn1.eval()
    theirs = copy.deepcopy(ours)
    theirs.conv1.register_forward_hook(lambda *_: None)  # child by child
    x = torch.randn(2, 8, 6, 6)
    with fusedres.backend("reference"):
        found, expected = ours(x), theirs(x)
        found.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=key)
    for (key, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=key)


def test_a_gradient_penalty_raises_instead_of_being_zero():
    block, x = BLOCKS["basic"](), torch.randn(2, 8, 6, 6, requires_grad=True)
    with fusedres.backend("reference"):
        (dx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.square().sum().backward()


def test_compiled_blocks_hold_pytorchs_convolutions():
    block, x = BLOCKS["basic"](), torch.randn(2, 8, 6, 6)
    expected = copy.deepcopy(block)(x)
    convolutions = []

    def record(graph: Any, inputs: Any) -> Any:
        convolutions.extend(n for n in graph.graph.nodes if "conv2d" in str(n.target))
        return graph

    with fusedres.backend("reference"):
        found = torch.compile(block, backend=record, fullgraph=True)(x)
    assert len(convolutions) == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["basic", "padded"])
def test_autocast_of_a_float32_input(name):
    """Eager adds the float32 identity to bf16; only where all is cast the block is fused."""
    block, x = BLOCKS[name](), torch.randn(2, 8, 6, 6)
    with fusedres.backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert chained(block, x) == (name == "basic")
        assert chained(block, x.detach().bfloat16())


@pytest.mark.parametrize("settings", [{"groups": 2, "base_width": 64}, {"dilation": 2}], ids=str)
def test_groups_and_dilation_stay_in_the_function(settings):
    block = Bottleneck(16, 4, **settings)
    x = torch.randn(2, 16, 6, 6)
    with FusedOps() as ops:
        assert chained(block, x)
    assert ops.calls["conv_fwd"] == 2, "the 3x3 is PyTorch's"
    theirs = copy.deepcopy(block)
    theirs.conv1.register_forward_hook(lambda *_: None)
    with fusedres.backend("reference"):
        torch.testing.assert_close(block(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_no_gradient_changes_its_layout(block, layout):
    """That through a projection of stride 2 is of every second pixel, which has neither layout itself."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 8, 10, 12).to(memory_format=layout).requires_grad_()
    with fusedres.backend("cpu"):
        z = BLOCKS[block]().to(memory_format=layout)(x)
    assert "Fused" in type(z.grad_fn).__name__
    with Calls():
        z.backward(torch.randn_like(z))
    assert calls.count(torch.ops.aten.convolution_backward.default) >= 4
    copies = {torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
    assert not copies & set(calls)
