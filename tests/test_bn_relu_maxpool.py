"""functional.bn_relu_maxpool in each implementation against float64 and PyTorch's own three passes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bn_case import DTYPES, LAYOUTS
from fused_ops import FusedOps
from tolerances import assert_close_to_reference
from torch import nn

import fusedres
from fusedres import kernels, plan
from fusedres.functional import bn_relu_maxpool
from fusedres.kernels.rows import NOWHERE, RSTD, SCALE
from fusedres.nn import batch_norm_act_maxpool

SHAPES = [(2, 16, 9, 8), (1, 3, 7, 7), (2, 5, 1, 6), (3, 8, 2, 2), (1, 40, 1, 1), (2, 64, 19, 33)]
OPS = torch.ops.fusedres
COMPILED = "cpu" not in kernels.unavailable()


def eager(x, weight, bias, mean, var, *, training):
    return F.max_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)), 3, 2, 1)


def distinct(shape):
    """An activation whose values lie apart, so that rounding decides no maximum."""
    count = shape[0] * shape[1] * shape[2] * shape[3]
    values = (torch.randperm(count).float() / count - 0.4) * 4
    return values.view(shape)


def run(function, dtype, x, weight, bias, training, grad):
    to = torch.promote_types(dtype, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    weight, bias = (None if p is None else p.detach().to(to).requires_grad_() for p in (weight, bias))
    channels = x.shape[1]
    mean, var = torch.full((channels,), 0.1, dtype=to), torch.full((channels,), 1.5, dtype=to)
    out = function(x, weight, bias, mean, var, training=training)
    out.backward(grad.to(dtype))
    results = {"out": out.detach(), "mean": mean, "var": var, "dx": x.grad}
    return results | {n: p.grad for n, p in (("dweight", weight), ("dbias", bias)) if p is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(implementation, shape, dtype, layout, poisoned):
    for training, affine in itertools.product([True, False], repeat=2):
        if training and shape[0] * shape[2] * shape[3] == 1:
            continue
        x = distinct(shape).to(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(2, shape[1]) if affine else (None, None)
        if dtype != torch.float32:
            # in 16 bits values tie, and which of them wins is torch's rule on its own rounded tensor: keep
            # what is compared exact
            x = (x * 8).round() / 8
            training, weight, bias = False, None, None
        grad = torch.randn(F.max_pool2d(x, 3, 2, 1).shape)
        arguments = (x, weight, bias, training, grad)
        ours = run(bn_relu_maxpool, dtype, *arguments)
        theirs, reference = run(eager, dtype, *arguments), run(eager, torch.float64, *arguments)
        terms = {"dweight": 20.0 * grad.norm().item(), "dbias": grad.norm().item()}
        for name, value in ours.items():
            assert_close_to_reference(
                value, theirs[name], reference[name], terms=terms.get(name, 8.0), name=name
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_and_maximum_are_torchs_of_the_stored_activation(implementation, dtype):
    """Ties and windows without a positive value included, in training on 16-bit values too."""
    x = torch.randn(2, 24, 13, 10).to(dtype).to(memory_format=torch.channels_last)
    stats = OPS.bn_stats(x, torch.randn(24), torch.randn(24) - 0.5, 1e-5)
    z, index = OPS.bn_relu_maxpool(x, stats)
    stored = OPS.bn_act(x, stats, None, None, True)
    expected, flat = F.max_pool2d(stored, 3, 2, 1, return_indices=True)
    assert torch.equal(z, expected)
    rows, columns = torch.arange(z.shape[2])[:, None], torch.arange(z.shape[3])
    place = 3 * (flat // 10 - 2 * rows + 1) + flat % 10 - 2 * columns + 1
    assert torch.equal(index.long(), torch.where(expected > 0, place, NOWHERE))
    assert (index == NOWHERE).any() and (index != NOWHERE).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_behind_batch_statistics(implementation, dtype, layout, poisoned):
    """The gradient of the places that the forward has kept, in 16 bits too, where maxima tie."""
    for shape in ((2, 24, 13, 10), (1, 5, 7, 9)):
        x = torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(2, shape[1])
        with fusedres.backend("reference"):
            stats = OPS.bn_stats(x, weight, bias, 1e-5)
            z, index = OPS.bn_relu_maxpool(x, stats)
            grad = torch.randn_like(z.float()).to(dtype)
            wide = (grad.double(), index, x.double(), stats.double())
            exact = OPS.bn_relu_maxpool_backward_reduce(*wide)
            eager = OPS.bn_relu_maxpool_backward_reduce(grad, index, x, stats)
            exact_dx = OPS.bn_relu_maxpool_backward_apply(*wide, eager.double())
            eager_dx = OPS.bn_relu_maxpool_backward_apply(grad, index, x, stats, eager)
        sums = OPS.bn_relu_maxpool_backward_reduce(grad, index, x, stats)
        size = grad.double().abs().sum((0, 2, 3)).max().item()
        per_value = size * stats[SCALE].abs().max().item() / (x.numel() // shape[1])
        sizes = [size, size, per_value * stats[RSTD].max().item(), per_value]
        for row, terms in enumerate(sizes):
            assert_close_to_reference(sums[row], eager[row], exact[row], terms=terms, name=f"sums[{row}]")
        dx = OPS.bn_relu_maxpool_backward_apply(grad, index, x, stats, eager)
        assert_close_to_reference(dx, eager_dx, exact_dx, name="dx")


def test_nan_and_inf(implementation):
    """The largest value is +inf or the last NaN of a window, as torch's; gradients go where torch's go."""
    for value, training in itertools.product([float("nan"), float("inf"), -float("inf")], [True, False]):
        x = distinct((2, 20, 7, 6))
        x[0, 4, 2, 2] = x[0, 4, 2, 3] = x[1, 9, 0, 0] = value
        grad = torch.randn(2, 20, 4, 3)
        arguments = (torch.float32, x, torch.ones(20), torch.zeros(20), training, grad)
        ours, theirs = run(bn_relu_maxpool, *arguments), run(eager, *arguments)
        # a mean that isn't finite may be either, as Welford's is on a GPU
        unsure = ~theirs["mean"].isfinite()
        assert not ours["mean"][unsure].isfinite().any()
        ours["mean"][unsure] = theirs["mean"][unsure]
        for name, result in ours.items():
            torch.testing.assert_close(
                result, theirs[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_threads_give_the_same_bits(implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    x = torch.randn(3, 64, 45, 44).bfloat16().to(memory_format=torch.channels_last)
    grad = torch.randn(3, 64, 23, 22)
    arguments = (torch.bfloat16, x, torch.randn(64), torch.randn(64), True, grad)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(bn_relu_maxpool, *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_only_the_gradients_asked_for():
    with fusedres.backend("reference"):
        for wanted, training in itertools.product(itertools.product([True, False], repeat=3), [True, False]):
            if not any(wanted):
                continue
            leaves = [distinct((2, 4, 6, 6)), torch.ones(4), torch.zeros(4)]
            for leaf, want in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(want)
            out = bn_relu_maxpool(*leaves, torch.zeros(4), torch.ones(4), training=training)
            out.sum().backward()
            assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_saves_x_and_a_byte_for_every_output():
    x = distinct((2, 8, 9, 9)).requires_grad_()
    saved = []
    with (
        fusedres.backend("reference"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        out = bn_relu_maxpool(x, None, None, None, None, training=True)
    large = {(t.dtype, t.numel()) for t in saved if t.numel() > 5 * 8}
    assert large == {(torch.float32, x.numel()), (torch.uint8, out.numel())}


def test_double_backward_raises():
    x = distinct((1, 2, 5, 5)).requires_grad_()
    with fusedres.backend("reference"):
        out = bn_relu_maxpool(x, None, None, None, None, training=True)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            dx.sum().backward()


def test_without_a_kernel_it_is_composed():
    """Where an implementation, also a forced one, hasn't got it: bn_act and a max pool."""
    choice = plan.choose(plan.Problem("bn_relu_maxpool", "cpu", "float32", interpreted=True), {}, "triton")
    assert choice[:2] == ("aten", "triton has no kernel for bn_relu_maxpool")
    x = distinct((2, 4, 6, 6)).double()
    ones, zeros = torch.ones(4).double(), torch.zeros(4).double()
    expected = eager(x, ones, zeros, zeros.clone(), ones.clone(), training=True)
    assert torch.equal(bn_relu_maxpool(x, ones, zeros, zeros.clone(), ones.clone(), training=True), expected)


def test_errors_are_bn_acts():
    with pytest.raises(ValueError, match=r"weight must have one value per channel of x, \[4\], got \[3\]"):
        bn_relu_maxpool(torch.zeros(2, 4, 6, 6), torch.ones(3), None, None, None, training=True)
    with pytest.raises(ValueError, match="x must be 4D"):
        bn_relu_maxpool(torch.zeros(2, 4), None, None, None, None, training=True)


class TestStem:
    """The module glue: one pass if every child is what the kernel knows, else child by child."""

    def fused(self, norm=None, act=None, pool=None):
        children = (norm or nn.BatchNorm2d(8), act or nn.ReLU(), pool or nn.MaxPool2d(3, 2, 1))
        x = distinct((2, 8, 12, 12))
        norm_twin = nn.BatchNorm2d(8)
        with fusedres.backend("reference"), FusedOps() as seen:
            out = batch_norm_act_maxpool(*children, x)
        torch.testing.assert_close(out, children[2](children[1](norm_twin(x))))
        return bool(seen.calls["bn_relu_maxpool"])

    def test_fused(self):
        assert self.fused()
        assert self.fused(pool=nn.MaxPool2d((3, 3), (2, 2), (1, 1)))

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(3, 1, 1),
            nn.MaxPool2d(2, 2, 1),
            nn.MaxPool2d(3, 2, 0),
            nn.MaxPool2d(3, 2, 1, dilation=2),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1),
            nn.Identity(),
        ],
        ids=str,
    )
    def test_another_pool(self, pool):
        assert not self.fused(pool=pool)

    def test_another_activation(self):
        assert not self.fused(act=nn.GELU())
        assert not self.fused(act=nn.Identity())

    @pytest.mark.parametrize("child", ["norm", "act", "pool"])
    def test_hook_is_called(self, child):
        children = {"norm": nn.BatchNorm2d(8), "act": nn.ReLU(), "pool": nn.MaxPool2d(3, 2, 1)}
        called = []
        children[child].register_forward_hook(lambda *_: called.append(child))
        assert not self.fused(**children)
        assert called[0] == child
