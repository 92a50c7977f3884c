"""functional.bn_act on a CPU, in each implementation, against float64 and nn.BatchNorm2d."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from fused_ops import FusedOps
from tolerances import assert_close_to_reference

import fusedres
from fusedres import kernels, plan
from fusedres.functional import bn_act

COMPILED = "cpu" not in kernels.unavailable()
ISAS = ("generic", "avx2", "avx512", "avx512bf16")
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", *ISAS])
def implementation(request):
    """The fused path through one implementation, or one instruction set of the compiled one."""
    if request.param == "reference":
        with fusedres.backend("reference"):
            yield "reference"
        return
    if not COMPILED:
        pytest.skip(kernels.unavailable()["cpu"])
    from fusedres import _C

    before = _C.cpu_isa()
    try:
        _C.use_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    with fusedres.backend("cpu"):
        yield request.param
    _C.use_cpu_isa(before)


class Case:
    """One set of inputs, in the precision of ``dtype`` and laid out as asked."""

    def __init__(self, shape, dtype, layout, *, residual, relu=True, training=True, affine=True, offset=0.0):
        channels = shape[1]
        self.dtype, self.relu, self.training = dtype, relu, training

        def act():
            return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])

        self.x = (act() + offset).to(dtype)
        self.grad = act()
        self.residual = act() if residual else None
        self.weight, self.bias = (torch.randn(2, channels)) if affine else (None, None)
        self.mean, self.var = torch.randn(channels) + offset, torch.rand(channels) + 0.5

    def leaves(self, dtype):
        """x, residual, weight, bias, running mean and variance; parameters stay float32 at least."""
        parameters = torch.promote_types(dtype, torch.float32)

        def leaf(t, to):
            return None if t is None else t.detach().clone().to(to).requires_grad_()

        return (
            leaf(self.x, dtype),
            leaf(self.residual, dtype),
            leaf(self.weight, parameters),
            leaf(self.bias, parameters),
            self.mean.to(parameters, copy=True),
            self.var.to(parameters, copy=True),
        )

    def run(self, function, dtype=None):
        dtype = dtype or self.dtype
        x, residual, weight, bias, mean, var = self.leaves(dtype)
        out = function(x, weight, bias, mean, var, residual=residual, relu=self.relu, training=self.training)
        out.backward(self.grad.to(dtype))
        leaves = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
        results = {"out": out.detach(), "running_mean": mean, "running_var": var}
        return results | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}

    def check(self):
        ours, theirs, reference = self.run(bn_act), self.run(eager), self.run(eager, torch.float64)
        count = self.x.numel() // self.x.shape[1]
        # a sum of n terms of either sign: partial sums of sqrt(n), rounded log2(n) times if pairwise
        summed = count**0.5 * math.log2(count) if count > 1 else 1.0
        scale = (self.var.min() + 1e-5).rsqrt().item()
        if self.training:
            scale = self.x.double().var((0, 2, 3), correction=0).add(1e-5).rsqrt().max().item()
        highest = self.x.float().abs().max().item()
        # in dx the mean's rounding is multiplied by dweight / n, a few times 1 / sqrt(n)
        dx = scale * (4 + 3 * highest * scale * count**-0.5)
        # in dweight by the sum of du
        summed += highest * scale * count**0.5 if self.training else 0
        largest = {"dx": dx, "dweight": summed, "dbias": summed}
        for name, value in ours.items():
            terms = largest.get(name, highest)
            assert_close_to_reference(value, theirs[name], reference[name], terms=terms, name=name)
        return ours


def eager(x, weight, bias, mean, var, *, residual, relu, training):
    out = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


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
    case.check()


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


class TestOverwrittenGradient:
    """A backward may write over the gradient it was given only if nobody else can see it."""

    def build(self, residual=False):
        case = Case((2, 8, 6, 6), torch.float32, "channels_last", residual=residual)
        return case, case.leaves(torch.float32)

    def apply(self, case, leaves):
        x, residual, weight, bias, mean, var = leaves
        return bn_act(x, weight, bias, mean, var, residual=residual, relu=True, training=True)

    def test_an_owned_gradient_is_written_over(self):
        """Else the saving that this exists for would be gone unnoticed."""
        if not COMPILED:
            pytest.skip(kernels.unavailable()["cpu"])
        for residual in (False, True):
            case, leaves = self.build(residual)
            with fusedres.backend("cpu"), FusedOps() as seen:
                (self.apply(case, leaves) * case.grad).sum().backward()
            last = "bn_act_backward_reduce_" if residual else "bn_act_backward_apply_"
            assert seen.calls[last] == 1, seen.calls

    @pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
    def test_looking_leaves_no_holder_behind(self):
        """du goes on to the shortcut, where the engine adds to it in place only if it holds it alone."""
        case, (x, _, weight, bias, mean, var) = self.build()
        z = x * 1.5
        out = bn_act(z.sin(), weight, bias, mean, var, residual=z, training=True)
        loss = (out * case.grad).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        names = [e.name for e in profile.events()]
        assert "aten::add_" in names and "aten::add" not in names

    def test_callers_gradient(self):
        case, leaves = self.build()
        grad = case.grad.clone()
        self.apply(case, leaves).backward(grad)
        assert torch.equal(grad, case.grad)

    @pytest.mark.parametrize("residual", [False, True])
    def test_hook_that_keeps_it(self, residual):
        case, leaves = self.build(residual)
        kept = []
        out = self.apply(case, leaves)
        out.register_hook(lambda g: kept.append(g))
        (out * case.grad).sum().backward()
        assert torch.equal(kept[0], case.grad)

    def test_retain_grad(self):
        case, leaves = self.build()
        out = self.apply(case, leaves)
        out.retain_grad()
        (out * case.grad).sum().backward()
        assert torch.equal(out.grad, case.grad)

    def test_gradient_shared_with_another_branch(self):
        """The sum's backward gives the same tensor to both; each branch in each order."""
        for flip in (False, True):
            case, leaves = self.build()
            other = torch.randn_like(case.x).requires_grad_()
            twin = other * 1
            out = self.apply(case, leaves)
            total = twin + out if flip else out + twin
            (total * case.grad).sum().backward()
            assert torch.equal(other.grad, case.grad)
            expected = case.run(eager)
            torch.testing.assert_close(leaves[0].grad, expected["dx"], atol=1e-5, rtol=1e-4)

    def test_gradient_that_is_a_view(self):
        case, leaves = self.build()
        out = self.apply(case, leaves)
        whole = torch.cat([out, out * 2], 0)
        (whole * torch.cat([case.grad, case.grad])).sum().backward()
        case.grad = case.grad * 3
        torch.testing.assert_close(leaves[0].grad, case.run(eager)["dx"], atol=1e-5, rtol=1e-4)

    def test_two_residuals_in_a_row(self):
        """du is both the residual's gradient and an input of apply."""
        case, leaves = self.build(residual=True)
        x, residual, weight, bias, mean, var = leaves
        out = bn_act(self.apply(case, leaves), weight, bias, mean, var, residual=residual, training=True)
        (out * case.grad).sum().backward()
        mine = [leaf.grad.clone() for leaf in leaves[:4]]
        y, r, w, b, m, v = case.leaves(torch.float32)
        inner = eager(y, w, b, m, v, residual=r, relu=True, training=True)
        (eager(inner, w, b, m, v, residual=r, relu=True, training=True) * case.grad).sum().backward()
        for a, e in zip(mine, (y, r, w, b), strict=True):
            torch.testing.assert_close(a, e.grad, atol=1e-4, rtol=1e-3)

    def test_retain_graph_twice(self):
        case, leaves = self.build(residual=True)
        loss = (self.apply(case, leaves) * case.grad).sum()
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves[:4]]
        loss.backward()
        for leaf, first in zip(leaves[:4], once, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * first)


def test_double_backward_raises():
    case = Case((2, 4, 3, 3), torch.float32, "nchw", residual=False)
    with fusedres.backend("reference"):
        x, _, weight, bias, mean, var = case.leaves(torch.float32)
        out = bn_act(x, weight, bias, mean, var, training=True)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_saved_for_backward():
    """x and, only where a residual went through the ReLU, the output; nothing else of their size."""
    for residual in (False, True):
        case = Case((2, 8, 6, 6), torch.float32, "channels_last", residual=residual)
        x, r, weight, bias, mean, var = case.leaves(torch.float32)
        saved = []
        with (
            fusedres.backend("reference"),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ),
        ):
            out = bn_act(x, weight, bias, mean, var, residual=r, training=True)
        large = [t.data_ptr() for t in saved if t.numel() == x.numel()]
        assert large == [x.data_ptr()] + ([out.data_ptr()] if residual else [])


@pytest.mark.skipif(not COMPILED, reason="the compiled module is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_activations_are_left_to_aten(dtype):
    """From as many values as the plan says our kernels run, below they don't unless forced."""
    least = plan.least_values("cpu", str(dtype).removeprefix("torch."))
    assert least > 0
    for values, forced, expected in ((least, "auto", 1), (least - 64, "auto", 0), (64 * 8, "cpu", 1)):
        x = torch.zeros(values // 64, 64, 1, 1, dtype=dtype)
        with fusedres.backend(forced), FusedOps() as seen, torch.no_grad():
            bn_act(x, None, None, None, None, training=True)
        assert seen.calls["bn_act"] == expected, (values, forced)


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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(backend, dtype):
    """The same contract on CUDA tensors; the cuda backend has the forward op alone so far."""
    if backend in kernels.unavailable():
        pytest.skip(kernels.unavailable()[backend])
    for shape, residual, relu in itertools.product(
        [(4, 64, 9, 8), (2, 3, 5, 7)], [True, False], [True, False]
    ):
        case = Case(shape, dtype, "channels_last", residual=residual, relu=relu)
        stats = torch.ops.fusedres.bn_stats(case.x.cuda(), case.weight.cuda(), case.bias.cuda(), 1e-5)
        r = None if case.residual is None else case.residual.cuda()
        with fusedres.backend(backend):
            z = torch.ops.fusedres.bn_act(case.x.cuda(), stats, r, relu)
        with fusedres.backend("reference"):
            expected = torch.ops.fusedres.bn_act(
                case.x.cuda().double(), stats.double(), None if r is None else r.double(), relu
            )
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(z.double(), expected, atol=ulp, rtol=ulp)
