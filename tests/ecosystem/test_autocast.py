"""Autocast in bf16 and fp16, and torch.amp.GradScaler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from op_case import arguments
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from twin_steps import assert_as_exact, assert_same, left_behind, norms_of, short_twins, step

import fusedres
from fusedres import ops

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def scaler(scale: float) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def scaled_step(net: nn.Module, x: Tensor, dtype: torch.dtype, scaling: Any) -> dict[str, Tensor]:
    """The output, and what a step of SGD by a scaled loss leaves behind."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
        out = net(x)
    scaling.scale(out.double().square().mean()).backward()
    scaling.step(optimizer)
    scaling.update()
    return {"output": out.detach(), **left_behind(net)}


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        ("basic", torch.bfloat16, "cpu"),
        ("torchvision basic", torch.float16, "cpu"),
        ("timm basic", torch.bfloat16, "reference"),
        ("bottleneck", torch.float16, "reference"),
    ],
)
def test_a_scaled_step(name, dtype, backend):
    if backend == "cpu":
        pytest.importorskip("fusedres._C")
    eager, fused = short_twins(name)
    exact, x = copy.deepcopy(eager).double(), images()
    with fusedres.backend(backend), FusedOps() as ops:
        found = scaled_step(fused, x, dtype, scaler(2.0**4))
    assert ops.batch_norms == norms_of(fused)
    assert_as_exact(
        found,
        scaled_step(eager, x, dtype, scaler(2.0**4)),
        scaled_step(exact, x.double(), torch.float64, scaler(1.0)),
    )


@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_a_step_whose_gradients_overflow(name, reference):
    """It is skipped, and the next one has half the scale; the statistics have seen the batch."""
    eager, fused = short_twins(name)
    x, before = images(), left_behind(fused)
    for net in (eager, fused):
        scaling = scaler(2.0**40)
        after = scaled_step(net, x, torch.float16, scaling)
        assert scaling.get_scale() == 2.0**39
        assert not all(p.grad.isfinite().all() for p in net.parameters())
        for key, _ in net.named_parameters():
            assert torch.equal(after[key], before[key]), key
    for (key, buffer), expected in zip(fused.named_buffers(), eager.buffers(), strict=True):
        assert not torch.equal(buffer, before[key]), key
        torch.testing.assert_close(buffer, expected, rtol=2e-2, atol=2e-3, msg=key)


@HALVES
def test_a_region_without_autocast(dtype, reference):
    """All of the net, or a stage of it."""
    eager, fused = short_twins("torchvision basic")
    x = images()
    expected = step(copy.deepcopy(fused), x)

    @torch.autocast("cpu", dtype)
    def out_of_it(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net(x)  # type: ignore[no-any-return]

    found = step(copy.deepcopy(fused), x, out_of_it)
    assert_same(found, expected, rtol=0, atol=0)
    for net in (eager, fused):
        seen: list[torch.dtype] = []
        stage = net.layer2
        plain = stage.forward

        def full(x: Tensor, plain: Any = plain, seen: Any = seen) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                out: Tensor = plain(x.float())
            seen.append(out.dtype)
            return out

        stage.forward = full
        with torch.autocast("cpu", dtype), torch.no_grad(), FusedOps() as ops:
            out = net(x)
        assert seen == [torch.float32] and out.dtype == dtype
        if net is eager:
            expected = {"output": out}
    assert ops.batch_norms == norms_of(fused)
    assert_same({"output": out}, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_two_forwards_in_one_region(name, reference):
    """Weights that were cast without a gradient don't serve a forward that has one."""
    eager, fused = short_twins(name)
    exact, (x, y) = copy.deepcopy(eager).double(), images(8).chunk(2)

    def both(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            with torch.no_grad():
                net(y.to(x.dtype))
            return net(x) + net(y.to(x.dtype))  # type: ignore[no-any-return]

    with FusedOps() as ops:
        found = step(fused, x, both)
    assert ops.calls["cast_weights"] == 3
    assert_as_exact(found, step(eager, x, both), step(exact, x.double(), both))


def test_weights_are_cast_anew_after_a_step(reference):
    """Where autocast's own cache would go on with the old ones."""
    _, fused = short_twins("basic")
    x = images()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = fused.eval()(x)
        for p in fused.conv1.parameters():
            p.mul_(2)
        after = fused(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fused(x), after) and not torch.equal(before, after)


@HALVES
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ops.OPS)
def test_an_op_is_below_autocast(name, backend, dtype):
    """As PyTorch's own are: it computes with what it is given."""
    for args in arguments(name):
        results = []
        for enabled in (False, True):
            given = copy.deepcopy(args)
            with fusedres.backend(backend), torch.autocast("cpu", dtype, enabled=enabled):
                out = getattr(torch.ops.fusedres, name)(*given)
            tensors = tree_leaves((out, given))  # some write to what they are given
            results.append([t for t in tensors if isinstance(t, Tensor)])
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@HALVES
@pytest.mark.parametrize("name", ["basic", "torchvision basic", "timm basic"])
def test_a_net_in_16_bits(name, dtype):
    """model.bfloat16(): PyTorch's own operators, with the statistics in 16 bits that they update."""
    eager, fused = (net.to(dtype) for net in short_twins(name))
    x = images(dtype=dtype)
    with FusedOps() as called:
        found = step(fused, x)
    assert not called.batch_norms
    assert_same(found, step(eager, x))
