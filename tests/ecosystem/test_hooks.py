"""Hooks of modules and tensors: they are called as in eager nets, with the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_nets import images
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from twin_steps import assert_same, exact_twins, norms_of, step

KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
ACTS = {"torchvision basic": "relu", "timm basic": "act1"}
CHILDREN = (
    "conv1",
    "bn1",
    "maxpool",
    "layer1.0.conv1",
    "layer1.0.bn1",
    "layer2.0.conv2",
    "layer2.0.downsample",
    "layer2.0.downsample.0",
)
WHOLE = ("layer2.0", "layer1", "fc")

Seen = list[tuple[str, Any]]


def scaling(name: str, seen: Seen) -> Callable[..., Any]:
    """A hook of any kind: it keeps what it is given, and hands on the double of it."""

    def hook(module: nn.Module, first: Any, second: Any = None) -> Any:
        value = first if second is None else second
        seen.append((name, [v.detach().clone() for v in (value if isinstance(value, tuple) else (value,))]))
        # a full-backward hook sees the gradients of the outputs, and may change those of the inputs
        if isinstance(first, tuple) and isinstance(second, tuple):
            return tuple(None if v is None else 2 * v for v in first)
        return tuple(2 * v for v in value) if isinstance(value, tuple) else 2 * value

    return hook


def hooked_step(net: nn.Module, kind: str, names: list[str], x: Tensor) -> tuple[dict[str, Tensor], Seen]:
    seen: Seen = []
    handles = [getattr(net.get_submodule(name), f"register_{kind}")(scaling(name, seen)) for name in names]
    results = step(net, x)
    for handle in handles:
        handle.remove()
    return results, seen


def assert_same_calls(found: Seen, expected: Seen) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    torch.testing.assert_close([values for _, values in found], [values for _, values in expected])


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    nets = exact_twins(name)
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what a backward hook hands on can't be written over
    return nets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACTS)
def test_of_a_child(name, kind, reference):
    """One at a time, since each takes its own block or stem out of the fused path, and nothing else."""
    eager, fused = pair(name)
    x = images(2, 24, torch.float64)
    for child in (*CHILDREN, ACTS[name], f"layer1.0.{ACTS[name]}"):
        before = {key: value.clone() for key, value in fused.state_dict().items()}
        with FusedOps() as ops:
            found, seen = hooked_step(fused, kind, [child], x)
        assert ops.calls["conv_fwd"] == (5 if "layer" not in child else 3 if "layer1" in child else 2), child
        expected, expected_seen = hooked_step(eager, kind, [child], x)
        assert seen
        assert_same_calls(seen, expected_seen)
        assert_same(found, expected)
        for net in (eager, fused):
            net.load_state_dict(before)
    with FusedOps() as ops:
        fused(x)
    assert ops.batch_norms == norms_of(fused)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_child_of_a_small_block(kind):
    """Which is left to PyTorch's operators."""
    eager, fused = pair("torchvision basic")
    x = images(2, 24, torch.float64)
    names = [*CHILDREN, "relu", "layer1.0.relu"]
    with FusedOps() as ops:
        found, seen = hooked_step(fused, kind, names, x)
    assert not ops.batch_norms
    expected, expected_seen = hooked_step(eager, kind, names, x)
    assert_same_calls(seen, expected_seen)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACTS)
def test_of_whole_blocks(name, kind, reference):
    """They leave a block fused."""
    eager, fused = pair(name)
    x = images(2, 24, torch.float64)
    with FusedOps() as ops:
        found, seen = hooked_step(fused, kind, [*WHOLE, ""], x)
    assert ops.batch_norms == norms_of(fused)
    expected, expected_seen = hooked_step(eager, kind, [*WHOLE, ""], x)
    assert len(seen) == 4
    assert_same_calls(seen, expected_seen)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "register", [nn_module.register_module_forward_hook, nn_module.register_module_forward_pre_hook]
)
@pytest.mark.parametrize("name", ACTS)
def test_of_every_module(name, register, reference):
    eager, fused = pair(name)
    x = images(2, 24, torch.float64)
    results = []
    for net in (fused, eager):
        names = {module: name for name, module in net.named_modules()}
        seen: list[str] = []
        handle = register(lambda module, *_, names=names, seen=seen: seen.append(names[module]))
        try:
            results.append((step(net, x), seen))
        finally:
            handle.remove()
    (found, called), (expected, expected_called) = results
    # torchvision's blocks call the shortcut behind the last norm
    assert sorted(called) == sorted(expected_called) and len(called) > 20
    assert_same(found, expected)
    with FusedOps() as ops:
        fused(x)
    assert ops.batch_norms == norms_of(fused)


@pytest.mark.parametrize("name", ACTS)
def test_of_every_modules_backward(name, reference):
    """They fail as in eager nets, whose blocks add in place."""
    for net in pair(name):
        handle = nn_module.register_module_full_backward_hook(lambda *_: None)
        try:
            with pytest.raises(RuntimeError, match="view and is being modified inplace"):
                step(net, images(2, 24, torch.float64))
        finally:
            handle.remove()


@pytest.mark.parametrize("name", ["bottleneck", "torchvision basic", "timm basic"])
def test_of_tensors(name, reference):
    """Of parameters' gradients, as they come and as they are kept, and of an activation's."""
    x, results = images(2, 24, torch.float64), []
    for net in exact_twins(name):
        seen: Seen = []
        for key, p in net.named_parameters():
            p.register_hook(lambda g: 3 * g)
            p.register_post_accumulate_grad_hook(lambda p, k=key, s=seen: s.append((k, p.grad.clone())))

        def hooked(net: nn.Module, x: Tensor, seen: Seen = seen) -> Tensor:
            x = 2 * x
            x.register_hook(lambda g: 5 * g)
            out: Tensor = net(x)
            out.register_hook(lambda g: seen.append(("output", g.clone())))
            return out

        with FusedOps() as ops:
            results.append((step(net, x, hooked), sorted(seen, key=lambda call: call[0])))
    assert ops.batch_norms == norms_of(net)
    (expected, expected_seen), (found, found_seen) = results
    assert_same_calls(found_seen, expected_seen)
    assert_same(found, expected)
