"""Ops one layer at a time against eager PyTorch: ``functional.bn_act``, and a trained net's stem pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shapes import Norm
from torch import Tensor

from fusedres import functional
from fusedres.cli.bench import check

BATCH = 8
EPS = 1e-5

Inputs = dict[str, Tensor]
Layer = Callable[[Inputs, bool], Tensor]


def fused(t: Inputs, relu: bool) -> Tensor:
    return functional.bn_act(
        t["x"],
        t["weight"],
        t["bias"],
        None,
        None,
        residual=t.get("residual"),
        relu=relu,
        training=True,
        eps=EPS,
    )


def eager(t: Inputs, relu: bool) -> Tensor:
    out = F.batch_norm(t["x"], None, None, t["weight"], t["bias"], training=True, eps=EPS)
    if "residual" in t:
        out += t["residual"]
    return F.relu_(out) if relu else out


LAYERS = {"fused": fused, "eager": eager}


def make(norm: Norm, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, Tensor]:
    """Inputs and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def activation() -> Tensor:
        values = torch.randn(BATCH, norm.channels, norm.height, norm.width, generator=generator)
        return values.to(device, dtype, memory_format=torch.channels_last)

    inputs = {"x": activation(), "weight": torch.rand(norm.channels, generator=generator) + 0.5}
    inputs["bias"] = torch.randn(norm.channels, generator=generator)
    if norm.residual:
        inputs["residual"] = activation()
    return {name: t.to(device).requires_grad_() for name, t in inputs.items()}, activation()


def passes(norm: Norm, backward: bool) -> int:
    """Full tensors that the fused kernels read and write."""
    forward = 3 + norm.residual  # x, x -> z
    return forward + (5 + 2 * norm.residual if backward else 0)  # g, x; g, x -> dx; and z and du


def gate(layer: Layer, norm: Norm, inputs: Inputs, grad: Tensor) -> None:
    """No figure for a layer that isn't as right as eager PyTorch."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = observe(eager, norm, wide, grad.double())
    errors, baseline = (check.errors(observe(side, norm, inputs, grad), expected) for side in (layer, eager))
    failure = check.failure(errors, baseline, inputs["x"].dtype)
    assert failure is None, str(failure)


def observe(layer: Layer, norm: Norm, inputs: Inputs, grad: Tensor) -> tuple[Inputs, Inputs]:
    z = layer(inputs, norm.relu)
    gradients = torch.autograd.grad(z, list(inputs.values()), grad)
    return {"z": z.detach()}, dict(zip(inputs, gradients, strict=True))


@pytest.mark.parametrize("implementation", LAYERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bn_act(norm: Norm, dtype: torch.dtype, backward: bool, implementation: str, measure, device) -> None:
    inputs, grad = make(norm, dtype, device)
    layer = LAYERS[implementation]
    gate(layer, norm, inputs, grad)

    def step() -> None:
        with torch.set_grad_enabled(backward):
            z = layer(inputs, norm.relu)
        if backward:
            torch.autograd.grad(z, list(inputs.values()), grad)

    name = "forward+backward" if backward else "forward"
    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    measure(
        step,
        f"bn_act {name}, {norm}, batch {BATCH}, {bits}",
        implementation,
        dtype,
        shape=[BATCH, norm.channels, norm.height, norm.width],
        bytes=passes(norm, backward) * norm.values(BATCH) * inputs["x"].element_size(),
    )


STEM = (16, 64, 112, 112)
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "fused": lambda x: torch.ops.fusedres.bias_relu_maxpool(x, None),
    "eager": lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
}


@pytest.mark.parametrize("implementation", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bias_relu_maxpool(dtype: torch.dtype, implementation: str, measure, device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEM, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    pool = POOLS[implementation]
    # without a bias nothing is rounded
    assert torch.equal(pool(x), POOLS["eager"](x))

    def step() -> None:
        with torch.inference_mode():
            pool(x)

    image = "x".join(map(str, STEM[1:]))
    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    measure(
        step,
        f"bias_relu_maxpool, {image}, batch {STEM[0]}, {bits}",
        implementation,
        dtype,
        op="bias_relu_maxpool",
        shape=list(STEM),
        bytes=x.numel() * x.element_size() * 5 // 4,  # x -> z
    )
