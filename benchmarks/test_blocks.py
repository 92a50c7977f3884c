"""Residual blocks in training: ResNet-18's and 50's, and tiny ones.

A tiny block shows what the Python around the kernels costs.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from compare import BITS, FUSED, LAYOUTS, SIDES, Case, Side, in_layout
from shapes import Block
from torch import Tensor, nn

from fusedres.cli import roofline
from fusedres.cli.bench.eager import EagerBlock
from fusedres.nn import BasicBlock, Bottleneck

BATCH = 8
TINY = {"basic": Block(64, 64, 1, 8, 8, 2), "bottleneck": Block(64, 16, 1, 8, 8, 3)}
TINY_ROUNDS = 400


def eager_block(block: Block) -> nn.Module:
    """torchvision's where it is installed."""
    plain = EagerBlock(*block.convolutions)
    try:
        resnet: Any = importlib.import_module("torchvision.models.resnet")
    except ImportError:
        return plain
    kind = resnet.BasicBlock if block.depth == 2 else resnet.Bottleneck
    return kind(block.inputs, block.planes, block.stride, plain.downsample)  # type: ignore[no-any-return]


def fused_block(block: Block, plain: Any) -> nn.Module:
    """With the same values."""
    kind = BasicBlock if block.depth == 2 else Bottleneck
    fused = kind(block.inputs, block.planes, block.stride, plain.downsample)
    fused.load_state_dict(plain.state_dict())
    return fused


def forward(side: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return side(x)  # type: ignore[no-any-return]


def step(side: nn.Module, x: Tensor, grad: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = forward(side, x, grad.dtype)
    if backward:
        torch.autograd.grad(out, [x, *side.parameters()], grad)


def observe(side: nn.Module, x: Tensor, grad: Tensor, backward: bool) -> Any:
    """Output, running statistics, and every gradient."""
    with torch.set_grad_enabled(backward):
        out = forward(side, x, grad.dtype)
    named = getattr(side, "_orig_mod", side)  # behind torch.compile: the names without its prefix
    gradients: dict[str, Tensor] = {}
    if backward:
        leaves = {"x": x} | dict(named.named_parameters())
        found = torch.autograd.grad(out, list(leaves.values()), grad)
        gradients = dict(zip(leaves, found, strict=True))
    return {"out": out.detach()} | {name: t.clone() for name, t in named.named_buffers()}, gradients


def make(block: Block, dtype: torch.dtype, backward: bool, batch: int, device: torch.device) -> Case:
    torch.manual_seed(0)
    plain = eager_block(block).to(device)
    x = torch.randn(batch, block.inputs, block.height, block.width, device=device).to(dtype)
    grad = torch.randn(*block.output(batch), device=device).to(dtype)

    def side(name: str) -> Side:
        module = in_layout(fused_block(block, plain) if name == FUSED else plain, name)
        own, of_output = (t.contiguous(memory_format=LAYOUTS[name]) for t in (x, grad))
        arguments = (module, own.requires_grad_(backward), of_output, backward)
        return Side(functools.partial(step, *arguments), functools.partial(observe, *arguments))

    wide = in_layout(plain, "eager").double()
    expected = observe(wide, x.double().requires_grad_(backward), grad.double(), backward)
    placed = roofline.block_passes(block.planned(batch), str(dtype).removeprefix("torch."), backward)
    sides = {name: functools.partial(side, name) for name in SIDES}
    return Case(sides, expected, x.shape, dtype, [each.work for each in placed])


def title(block: Block, dtype: torch.dtype, backward: bool, batch: int) -> str:
    return f"{block}, {BITS[dtype]}, batch {batch}, {'forward+backward' if backward else 'forward'}"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", list(BITS), ids=list(BITS.values()))
def test_block(block: Block, dtype: torch.dtype, backward: bool, side: str, measure, device) -> None:
    measure(title(block, dtype, backward, BATCH), side, lambda: make(block, dtype, backward, BATCH, device))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", TINY)
def test_overhead(kind: str, backward: bool, side: str, measure, device) -> None:
    block, dtype = TINY[kind], torch.float32
    measure(
        title(block, dtype, backward, 1),
        side,
        lambda: make(block, dtype, backward, 1, device),
        rounds=TINY_ROUNDS,
    )
