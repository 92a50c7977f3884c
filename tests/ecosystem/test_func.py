"""torch.func, forward-mode AD, vmap and double backward: PyTorch's results, or an error; never zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem_nets import NETS, images, twins
from fused_ops import FusedOps
from op_case import arguments
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from fusedres import ops

SOME = ["basic", "torchvision bottleneck", "timm basic"]


def loss_of(net: nn.Module, x: Tensor) -> Callable[[Any], Any]:
    """Of parameters: the loss and the buffers that the forward leaves."""

    def loss(parameters: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        return functional_call(net, (parameters, buffers), (x,)).square().mean(), buffers

    return loss


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_functional_call(fused_by, name, training):
    """Parameters and buffers of the caller's; the net stays fused, and its own are left alone."""
    eager, fused = (net.train(training) for net in twins(name))
    before = copy.deepcopy(fused.state_dict())
    x = images()
    with FusedOps() as called:
        loss, buffers = loss_of(fused, x)(dict(fused.named_parameters()))
    assert called.names
    expected, expected_buffers = loss_of(eager, x)(dict(eager.named_parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers, expected_buffers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SOME)
def test_grad(fused_by, name, training):
    eager, fused = (net.train(training) for net in twins(name))
    x = images()
    found, expected = (
        torch.func.grad_and_value(loss_of(net, x), has_aux=True)(parameters_of(net)) for net in (fused, eager)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SOME)
def test_vjp_and_jvp(fused_by, name):
    eager, fused = (net.eval() for net in twins(name))
    x, tangent = images(), images()
    (out, pull), (expected_out, expected_pull) = (torch.func.vjp(net, x) for net in (fused, eager))
    torch.testing.assert_close((out, pull(out)), (expected_out, expected_pull(out)))
    found, expected = (torch.func.jvp(net, (x,), (tangent,)) for net in (fused, eager))
    torch.testing.assert_close(found, expected)
    assert found[1].abs().max() > 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SOME)
def test_forward_mode(fused_by, name, training):
    nets = [net.train(training) for net in twins(name)]
    x, tangent = images(), images()
    with forward_ad.dual_level():
        expected, found = (
            forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent for net in nets
        )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SOME)
def test_vmap(fused_by, name):
    """Over images, over the parameters of an ensemble, and a gradient for each image."""
    eager, fused = (net.eval() for net in twins(name))
    x = images(6)
    out = torch.func.vmap(fused)(x.unflatten(0, (3, 2)))
    torch.testing.assert_close(out.flatten(0, 1), eager(x), rtol=1e-4, atol=1e-5)

    members = [fused, copy.deepcopy(fused)]
    nn.init.normal_(members[1].fc.bias)
    state = torch.func.stack_module_state(members)
    outs = torch.func.vmap(lambda one: functional_call(fused, one, (x,)))(state)
    torch.testing.assert_close(outs, torch.stack([net(x) for net in members]), rtol=1e-4, atol=1e-5)

    def loss(parameters: Any, image: Tensor) -> Tensor:
        return functional_call(fused, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters_of(fused), x[:2])
    for i in range(2):
        eager.zero_grad()
        eager(x[i : i + 1]).square().sum().backward()
        for key, p in eager.named_parameters():
            torch.testing.assert_close(each[key][i], p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_gradient_penalty(name, fused_by):
    """Raises, whichever of the inputs is asked for; under torch.func it is PyTorch's own."""
    eager, fused = (net.eval() for net in twins(name))
    x = images().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    penalty = fused(x).mean() + dx.square().sum()
    raises = {"expected_exception": RuntimeError, "match": "can't be differentiated again"}
    for asked in ([x], [fused.conv1.weight], [fused.layer3[0].bn1.weight]):
        with pytest.raises(**raises):
            torch.autograd.grad(penalty, asked, retain_graph=True)
    with pytest.raises(**raises):
        penalty.backward()

    def penalty_of(net: nn.Module) -> Any:
        return torch.func.grad(lambda x: torch.func.grad(lambda y: net(y).square().mean())(x).square().sum())

    found, expected = (penalty_of(net)(x.detach()) for net in (fused, eager))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_products_by_two_backwards(fused_by):
    """torch.autograd.functional.jvp differentiates a gradient by what it was given."""
    _, fused = twins("bottleneck")
    x, v = images(), images()
    for product in ("jvp", "hvp", "vhp"):
        of = fused if product == "jvp" else (lambda x: fused(x).sum())
        with pytest.raises(RuntimeError, match="can't be differentiated again"):
            getattr(torch.autograd.functional, product)(of, x, v)


def test_a_batch_of_gradients(fused_by):
    eager, fused = (net.eval() for net in twins("basic"))
    x = images(2)
    with pytest.raises(NotImplementedError, match="a fused backward takes one gradient at a time"):
        torch.autograd.functional.jacobian(fused, x, vectorize=True)
    expected = torch.autograd.functional.jacobian(eager, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(fused, x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.func.jacrev(fused)(x), expected, rtol=1e-3, atol=1e-4)


def _is_real(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


@pytest.mark.parametrize("name", ops.OPS)
def test_an_op_by_itself_gives_no_wrong_derivative(name):
    op, args = getattr(torch.ops.fusedres, name), arguments(name)[0]
    place = next(i for i, a in enumerate(args) if isinstance(a, list) or _is_real(a))
    given = args[place]
    x = (given[0] if isinstance(given, list) else given).clone()

    def call(x: Tensor) -> Any:
        return op(*args[:place], [x] if isinstance(given, list) else x, *args[place + 1 :])

    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
        call(x.requires_grad_())
