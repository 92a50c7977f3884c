"""functional.bn_act on a CPU, in each implementation, against float64 and nn.BatchNorm2d."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bn_case import DTYPES, LAYOUTS, Case, eager
from fused_ops import FusedOps

import fusedres
from fusedres import kernels, plan
from fusedres.functional import BatchNorm, bn_act

COMPILED = "cpu" not in kernels.unavailable()
SHAPES = [
    (2, 3, 5, 7),
    (3, 20, 1, 1),
    (1, 130, 3, 3),
    (2, 1, 6, 5),
    (4, 64, 9, 8),
    (2, 48, 17, 1),
    (300, 8, 2, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(implementation, shape, dtype, layout, poisoned):
    for residual, relu, training in itertools.product([False, True], repeat=3):
        Case(shape, dtype, layout, residual=residual, relu=relu, training=training).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_with_a_norm_of_its_own(implementation, shape, dtype, layout, poisoned):
    for relu, training, branch in itertools.product([False, True], repeat=3):
        Case(shape, dtype, layout, residual=True, relu=relu, training=training, branch=branch).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_chunks_and_threads_give_the_same_bits(implementation, layout):
    case = Case((5, 24, 60, 61), torch.bfloat16, layout, residual=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results.append(case.check())
    finally:
        torch.set_num_threads(threads)
    if implementation != "reference":
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_from_zero(implementation, layout):
    """|mean| / std = 1e3, where E[x^2] - E[x]^2 would have no digit left."""
    for residual, training in itertools.product([False, True], repeat=2):
        Case((4, 24, 20, 11), torch.float32, layout, residual=residual, training=training, offset=1e3).check()


def test_first_value_an_outlier(implementation):
    case = Case((4, 24, 20, 11), torch.float32, "channels_last", residual=False)
    case.x[0, :, 0, 0] = 1e4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # PyTorch's own error, which is the measure, depends on it
        case.check()
    finally:
        torch.set_num_threads(threads)


def test_zero_gamma_and_no_affine(implementation):
    case = Case((2, 16, 5, 5), torch.float32, "channels_last", residual=True)
    case.weight = torch.zeros(16)
    case.check()
    Case((2, 16, 5, 5), torch.float32, "nchw", residual=False, affine=False).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf(implementation, layout, value):
    """A channel with one of them is NaN as torch's is; the others don't notice."""
    for at, training, residual in itertools.product([0, 3], [True, False], [True, False]):
        case = Case((2, 20, 3, 3), torch.float32, layout, residual=residual, training=training)
        case.x[1, 7, 0, at % 3] = value
        case.x[0, 4, 0, 0] = value
        ours, theirs = case.run(bn_act), case.run(eager)
        for name, result in ours.items():
            torch.testing.assert_close(
                result, theirs[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_layouts_that_are_neither(implementation):
    """Transposed, sliced and expanded input and gradient: right, with torch's own output layout."""
    base = torch.randn(4, 6, 8, 10)
    for x in (base.transpose(2, 3), base[:, ::2], base[:, :, 1:, :-1], base[:, :1].expand(4, 6, 8, 10)):
        x = x.detach().requires_grad_()
        channels = x.shape[1]
        weight, bias = torch.randn(2, channels)
        out = bn_act(x, weight, bias, None, None, training=True)
        (dx,) = torch.autograd.grad(out.sum(), x)  # an expanded gradient
        y = x.detach().requires_grad_()
        expected = F.relu(F.batch_norm(y, None, None, weight, bias, True))
        (dy,) = torch.autograd.grad(expected.sum(), y)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(dx, dy, atol=1e-5, rtol=1e-4)


def test_empty_batch():
    for residual in (None, torch.randn(0, 4, 3, 3)):
        x = torch.randn(0, 4, 3, 3, requires_grad=True)
        weight = torch.ones(4, requires_grad=True)
        mean, var = torch.zeros(4), torch.ones(4)
        out = bn_act(x, weight, torch.zeros(4), mean, var, residual=residual, training=True)
        out.sum().backward()
        assert out.shape == x.shape and x.grad.shape == x.shape
        assert torch.equal(weight.grad, torch.zeros(4)) and torch.equal(mean, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_the_activations_dtype(implementation, dtype):
    """model.bfloat16(): parameters and running statistics are 16 bits too."""
    x = torch.randn(4, 8, 5, 5).to(dtype).requires_grad_()
    weight, bias = (torch.randn(8).to(dtype).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)
    bn_act(x, weight, bias, mean, var, training=True).float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == dtype and x.grad.isfinite().all()
    assert not torch.equal(mean, torch.zeros(8, dtype=dtype))


def test_parameters_that_are_not_contiguous(implementation):
    both = torch.randn(8, 2)
    x = torch.randn(2, 8, 5, 5)
    out = bn_act(x, both[:, 0], both[:, 1], None, None, training=True)
    torch.testing.assert_close(out, F.relu(F.batch_norm(x, None, None, both[:, 0], both[:, 1], True)))


def test_only_the_gradients_asked_for(implementation):
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        for training in (True, False):
            case = Case((2, 8, 5, 5), torch.float32, "channels_last", residual=True, training=training)
            results = []
            for function in (bn_act, eager):
                *leaves, mean, var = case.leaves(torch.float32)
                for leaf, want in zip(leaves, wanted, strict=True):
                    leaf.requires_grad_(want)
                x, residual, weight, bias = leaves
                function(
                    x, weight, bias, mean, var, residual=residual, relu=True, training=training
                ).backward(case.grad)
                results.append([leaf.grad for leaf in leaves])
            for ours, theirs in zip(*results, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradcheck_of_the_reference():
    with fusedres.backend("reference"):
        for residual, relu, training in itertools.product([False, True], repeat=3):
            case = Case((2, 3, 3, 2), torch.float64, "nchw", residual=residual, relu=relu, training=training)
            x, r, weight, bias, mean, var = case.leaves(torch.float64)

            def function(x, weight, bias, *r, c=case, m=mean, v=var):
                return bn_act(
                    x,
                    weight,
                    bias,
                    m.clone(),
                    v.clone(),
                    residual=r[0] if r else None,
                    relu=c.relu,
                    training=c.training,
                )

            inputs = (x, weight, bias) + ((r,) if residual else ())
            assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_activations_are_left_to_aten(dtype):
    """From as many values as the plan says our kernels run, below they don't unless forced."""
    least = plan.least_values("cpu")
    assert least > 0
    for values, forced, expected in ((least, "auto", 1), (least - 64, "auto", 0), (64 * 8, "cpu", 1)):
        x = torch.zeros(values // 64, 64, 1, 1, dtype=dtype)
        with fusedres.backend(forced), FusedOps() as seen, torch.no_grad():
            bn_act(x, None, None, None, None, training=True)
        assert seen.calls["bn_act"] == expected, (values, forced)


NORM = BatchNorm(None, None, None, None, training=True)


class TestErrors:
    x = torch.randn(8, 64, 7, 7)
    ones = torch.ones(64)

    def call(self, **kwargs):
        arguments = {
            "x": self.x,
            "weight": self.ones,
            "bias": self.ones,
            "running_mean": self.ones.clone(),
            "running_var": self.ones.clone(),
            "training": True,
        } | kwargs
        return bn_act(**arguments)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"x": torch.randn(8, 64)}, ValueError, r"x must be 4D, \[N, C, H, W\], got 2D \[8, 64\]"),
            ({"x": torch.ones(8, 64, 7, 7, dtype=torch.int32)}, TypeError, "x must be floating point"),
            (
                {"residual": torch.randn(8, 64, 3, 3)}, ValueError,
                r"residual must have the shape of x, \[8, 64, 7, 7\], got \[8, 64, 3, 3\]",
            ),
            (
                {"residual": torch.randn(8, 64, 7, 7).bfloat16()}, TypeError,
                "residual must have the dtype of x, torch.float32, got torch.bfloat16",
            ),
            (
                {"weight": torch.ones(32)}, ValueError,
                r"weight must have one value per channel of x, \[64\], got \[32\]",
            ),
            ({"residual_norm": NORM}, ValueError, "residual_norm needs a residual"),
            (
                {"residual": x, "residual_norm": NORM._replace(weight=torch.ones(32))}, ValueError,
                r"residual_norm.weight must have one value per channel of x, \[64\], got \[32\]",
            ),
            (
                {"residual": x, "residual_norm": NORM._replace(training=False)}, ValueError,
                "residual_norm.running_mean and residual_norm.running_var are needed when training=False",
            ),
            ({"bias": torch.ones(64).half()}, TypeError, "bias must be torch.float32 or the dtype of x"),
            ({"running_mean": None}, ValueError, "must both be given, or neither"),
            ({"running_mean": None, "running_var": None, "training": False}, ValueError, "are needed"),
            (
                {"x": torch.randn(1, 64, 1, 1)}, ValueError,
                "Expected more than 1 value per channel when training, got input size",
            ),
            (
                {"weight": torch.ones(64, device="meta")}, ValueError,
                "weight must be on the device of x, cpu, got meta",
            ),
        ],
    )  # fmt: skip
    def test_says_what_was_needed_and_what_came(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            self.call(**kwargs)
