"""Residual blocks in training, fused against eager PyTorch: ResNet-18's and 50's, and tiny ones.

A tiny block shows what the Python around the kernels costs.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import Block
from torch import Tensor, nn

from fusedres.cli.bench import check
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


def sides(block: Block, device: torch.device) -> dict[str, nn.Module]:
    """The same block, with the same values."""
    torch.manual_seed(0)
    plain: Any = eager_block(block)
    kind = BasicBlock if block.depth == 2 else Bottleneck
    fused = kind(block.inputs, block.planes, block.stride, copy.deepcopy(plain.downsample))
    fused.load_state_dict(plain.state_dict())
    both = {"fused": fused, "eager": plain}
    return {name: side.to(device, memory_format=torch.channels_last) for name, side in both.items()}


def observe(side: nn.Module, x: Tensor, grad: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output, running statistics, and every gradient."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=grad.dtype == torch.bfloat16):
        out = side(x)
    leaves = {"x": x} | dict(side.named_parameters())
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    buffers = {name: value.clone() for name, value in side.named_buffers()}
    return {"out": out.detach()} | buffers, dict(zip(leaves, gradients, strict=True))


def step_of(side: nn.Module, x: Tensor, grad: Tensor, backward: bool) -> Callable[[], object]:
    leaves = [x, *side.parameters()]
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=grad.dtype == torch.bfloat16)

    def step() -> None:
        with torch.set_grad_enabled(backward), autocast:
            out = side(x)
        if backward:
            torch.autograd.grad(out, leaves, grad)

    return step


def run(
    block: Block, dtype: torch.dtype, backward: bool, implementation: str, batch: int, **settings
) -> None:
    measure, device = settings.pop("measure"), settings.pop("device")
    both = sides(block, device)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, block.inputs, block.height, block.width)
    x, grad = (
        torch.randn(of, generator=generator).to(device, dtype, memory_format=torch.channels_last)
        for of in (shape, block.output(batch))
    )
    wide = copy.deepcopy(both["eager"]).double()
    expected = observe(wide, x.double(), grad.double())
    errors = {name: check.errors(observe(side, x, grad), expected) for name, side in both.items()}
    failure = check.failure(errors["fused"], errors["eager"], dtype)
    assert failure is None, str(failure)

    steps = {name: step_of(side, x.requires_grad_(backward), grad, backward) for name, side in both.items()}
    other = "eager" if implementation == "fused" else "fused"
    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    measure(
        steps[implementation],
        f"{block} {'forward+backward' if backward else 'forward'}, batch {batch}, {bits}",
        implementation,
        dtype,
        against=(other, steps[other]),
        shape=list(shape),
        error=max(errors[implementation].worst_output, errors[implementation].worst_gradient or 0.0),
        **settings,
    )


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_block(
    block: Block, dtype: torch.dtype, backward: bool, implementation: str, measure, device
) -> None:
    run(block, dtype, backward, implementation, BATCH, measure=measure, device=device)


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("kind", TINY)
def test_overhead(kind: str, backward: bool, implementation: str, measure, device) -> None:
    run(
        TINY[kind],
        torch.float32,
        backward,
        implementation,
        1,
        measure=measure,
        device=device,
        rounds=TINY_ROUNDS,
    )
