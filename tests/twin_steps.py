"""What a training step leaves behind, of a net and of its eager twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from chain_case import FLIPPED
from ecosystem_nets import twins
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]


def short_twins(name: str) -> tuple[nn.Module, nn.Module]:
    """An eager net and the fused one without their last two stages, which have most of the parameters."""
    pair = twins(name)
    for net in pair:
        whole: Any = net
        whole.layer3, whole.layer4 = nn.Sequential(), nn.Sequential()
        weight, bias = whole.fc.parameters()
        whole.fc = nn.Linear(weight.shape[1] // 4, weight.shape[0])
        whole.fc.load_state_dict({"weight": weight[:, : whole.fc.in_features], "bias": bias})
    return pair


def exact_twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The same in float64, where they differ by rounding that ReLUs don't amplify."""
    eager, fused = short_twins(name)
    return eager.double(), fused.double()


def norms_of(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def left_behind(net: nn.Module) -> dict[str, Tensor]:
    """Parameters, their gradients, and buffers."""
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in (net.state_dict() | gradients).items()}


def step(net: nn.Module, x: Tensor, forward: Forward | None = None) -> dict[str, Tensor]:
    """The output of a forward, and what it and the backward leave behind."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    out = net(x) if forward is None else forward(net, x)
    out.square().mean().backward()
    return {"output": out.detach(), "gradient of x": x.grad, **left_behind(net)}  # type: ignore[dict-item]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerances: Any) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda said, n=name: f"{n}: {said}", **tolerances)


def assert_as_exact(
    found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], times: float = 2
) -> None:
    """Within ``times`` eager's own error, as root of the mean square; see ``ChainCase.check``."""
    assert found.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == eager[name].dtype, name
        if value.is_floating_point():
            error, allowed = ((t[name].double() - value).norm() for t in (found, eager))
            flipped = FLIPPED if name.startswith("gradient") else 1e-6
            assert error <= times * allowed + flipped * value.norm(), name
        else:
            assert torch.equal(found[name], value), name
