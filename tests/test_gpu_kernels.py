"""The numbers of the GPU implementations of the batch-norm ops, against float64.

On a GPU Triton's and CUDA's; without one Triton's in its interpreter, or the CUDA kernels in the
emulation, which both have to be there when Python starts:

    TRITON_INTERPRET=1 pytest tests/test_gpu_kernels.py
    env $(python tests/emulation/build.py --env) pytest tests/test_gpu_kernels.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from torch import Tensor, nn

import fusedres
from fusedres.functional import BatchNorm
from fusedres.kernels.rows import DBIAS, DWEIGHT, MEAN, OFFSET, RSTD, SCALE, SHIFT, SLOPE, VAR

pytestmark = [
    # numpy, as it interprets
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.usefixtures("gpu_backend", "poisoned"),
]

OPS = torch.ops.fusedres
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS = [1, 3, 8, 20, 64, 130]
IMAGES = {1: (1, 1, 1), 7: (7, 1, 1), 33: (1, 3, 11), 1003: (17, 59, 1)}  # rows: N, H, W
# what is added to the normalised x: nothing, a tensor, or a tensor that is normalised as well
RESIDUALS = ["none", "plain", "normalised"]


class Problem:
    """Inputs of every op for one shape; ``double()`` is the same problem in float64."""

    def __init__(
        self, rows: int, channels: int, dtype: torch.dtype, mean: float = 0.5, std: float = 2.0
    ) -> None:
        torch.manual_seed(rows * 1000 + channels)
        n, h, w = IMAGES.get(rows, (1, rows, 1))

        def activation() -> Tensor:
            return torch.randn(n, channels, h, w).to(memory_format=torch.channels_last)

        self.x = (activation() * std + mean).to(dtype)
        self.residual = (activation() - mean / 2).to(dtype)
        self.weight, self.bias = torch.randn(channels), torch.randn(channels)
        self.residual_weight, self.residual_bias = torch.randn(channels), torch.randn(channels)
        self.grad = activation().to(dtype)
        self.compute_stats()
        self.compute_outputs()
        # a gradient only where rounding can't decide on which side of the ReLU an element lies
        double = self.double()
        for residual in RESIDUALS:
            with fusedres.backend("reference"):
                u = forward(double, residual, relu=False)
            self.grad[u.abs() <= 1e-2] = 0.0
        with fusedres.backend("reference"):
            _, self.sums, self.residual_sums = backward_reduce(self, "normalised", True)

    def compute_stats(self) -> None:
        with fusedres.backend("reference"):
            self.stats = OPS.bn_stats(self.x, self.weight, self.bias, EPS)
            self.residual_stats = OPS.bn_stats(self.residual, self.residual_weight, self.residual_bias, EPS)

    def compute_outputs(self) -> None:
        """The stored outputs, which a backward finds."""
        with fusedres.backend("reference"):
            self.z = {residual: forward(self, residual, relu=True) for residual in RESIDUALS}

    def branch(self, residual: str) -> tuple[Tensor | None, Tensor | None]:
        """The residual where it is normalised, and its statistics."""
        return (self.residual, self.residual_stats) if residual == "normalised" else (None, None)

    def terms(self, residual: str) -> float:
        """The largest of the terms of an output."""
        sides = [(self.x, self.stats)]
        if residual == "normalised":
            sides.append((self.residual, self.residual_stats))
        return max(_largest(t.float() * _vector(stats[SCALE])) for t, stats in sides)

    def stats_terms(self) -> list[float]:
        """What the rows of stats are added up from; PyTorch's own sums on a CPU are float64 inside."""
        # kernels sum x - one of its values, so that a mean far from 0 costs no digits
        shifted = self.x.float() - self.x[:1, :, :1, :1].float()
        return [_largest(shifted), *(3 * _largest(row) for row in self.stats[1:])]

    def sums_terms(self, residual: str) -> list[float]:
        """The same for the rows of sums: row after row, each with a rounding of random sign."""
        rows = self.x.numel() // self.x.shape[1]
        du = torch.where(self.z[residual] <= 0, 0.0, self.grad).float()
        terms = []
        for t, stats in ((self.x, self.stats), self.branch(residual)):
            if t is not None and stats is not None:
                normalized = (t.float() - _vector(stats[MEAN])) * _vector(stats[RSTD])
                norms = [
                    torch.linalg.vector_norm(each, dim=(0, 2, 3))
                    for each in (self.grad.float(), du * normalized)
                ]
                per_value = stats[SCALE] / rows
                norms += [per_value * stats[RSTD] * norms[1], per_value * norms[0]]
                terms += [0.5 * rows**0.5 * _largest(norm) for norm in norms]
        return terms

    def double(self) -> Problem:
        def widened(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: widened(v) for k, v in value.items()}
            return value.double()

        other = object.__new__(Problem)
        other.__dict__ = widened(self.__dict__)
        return other


def _vector(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _largest(t: Tensor) -> float:
    return t[t.isfinite()].abs().max().item()


def forward(p: Problem, residual: str, relu: bool) -> Tensor:
    added = (p.residual, None) if residual == "plain" else p.branch(residual)
    return OPS.bn_act(p.x, p.stats, *added, relu)


def backward_reduce(p: Problem, residual: str, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    z = p.z[residual] if relu and residual != "none" else None
    return OPS.bn_act_backward_reduce(p.grad, p.x, z, p.stats, *p.branch(residual), relu)


def backward_apply(
    p: Problem, residual: str, relu: bool, sums: Tensor | None, residual_sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    arguments = (p.x, p.stats, sums, *p.branch(residual), residual_sums)
    return OPS.bn_act_backward_apply(p.grad, *arguments, relu)


def compute_stats(p: Problem) -> tuple[Tensor, ...]:
    return tuple(OPS.bn_stats(p.x, p.weight, p.bias, EPS))


def reduce(p: Problem, residual: str, relu: bool) -> tuple[Tensor, ...]:
    """du, and every row of the sums by itself."""
    du, sums, residual_sums = backward_reduce(p, residual, relu)
    assert (residual_sums.numel() > 0) == (residual == "normalised")
    assert (du.numel() > 0) == (relu and residual != "none")
    return du, *sums, *residual_sums


def apply(p: Problem, residual: str, relu: bool) -> tuple[Tensor, ...]:
    """With sums, as behind the batch's statistics, and without, as behind frozen ones, on either side."""
    of_residual = (p.residual_sums, None) if residual == "normalised" else (None,)
    sums = itertools.product((p.sums, None), of_residual)
    return tuple(t for pair in sums for t in backward_apply(p, residual, relu, *pair) if t.numel())


def compare(
    run: Callable[[Problem], tuple[Tensor, ...]], problem: Problem, terms: list[float] | None = None
) -> None:
    """Hold each result of ``run`` to the float64 reference."""
    ours = run(problem)
    with fusedres.backend("reference"):
        eager, reference = run(problem), run(problem.double())
    for *results, size in zip(ours, eager, reference, terms or [0.0] * len(ours), strict=True):
        assert_close_to_reference(*results, terms=size)


def compare_reduce(problem: Problem, residual: str, relu: bool) -> None:
    compare(lambda p: reduce(p, residual, relu), problem, [0.0, *problem.sums_terms(residual)])


shapes = pytest.mark.parametrize(("rows", "channels"), [(m, c) for m in IMAGES for c in CHANNELS])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
residuals = pytest.mark.parametrize("residual", RESIDUALS)
relus = pytest.mark.parametrize("relu", [False, True])


@shapes
@dtypes
def test_bn_stats(rows: int, channels: int, dtype: torch.dtype) -> None:
    problem = Problem(rows, channels, dtype)
    compare(compute_stats, problem, problem.stats_terms())


@pytest.mark.parametrize("channels", CHANNELS)
def test_bn_stats_without_weight_or_bias(channels: int) -> None:
    p = Problem(33, channels, torch.float32)
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    for weight, bias in ((None, None), (p.weight, None), (None, p.bias)):
        explicit = OPS.bn_stats(p.x, ones if weight is None else weight, zeros if bias is None else bias, EPS)
        assert torch.equal(OPS.bn_stats(p.x, weight, bias, EPS), explicit)


@shapes
@dtypes
@residuals
@relus
def test_bn_act(rows: int, channels: int, dtype: torch.dtype, residual: str, relu: bool) -> None:
    problem = Problem(rows, channels, dtype)
    compare(lambda p: (forward(p, residual, relu),), problem, [problem.terms(residual)])


@shapes
@dtypes
@pytest.mark.parametrize(
    ("residual", "relu"),
    [("none", False), ("none", True), ("plain", True), ("normalised", False), ("normalised", True)],
)
def test_bn_act_backward_reduce(
    rows: int, channels: int, dtype: torch.dtype, residual: str, relu: bool
) -> None:
    compare_reduce(Problem(rows, channels, dtype), residual, relu)


@shapes
@dtypes
@pytest.mark.parametrize(("residual", "relu"), [("none", False), ("none", True), ("normalised", False)])
def test_bn_act_backward_apply(
    rows: int, channels: int, dtype: torch.dtype, residual: str, relu: bool
) -> None:
    compare(lambda p: apply(p, residual, relu), Problem(rows, channels, dtype))


def test_values_far_from_zero() -> None:
    problem = Problem(1003, 20, torch.float32, mean=1e3, std=1.0)
    compare(compute_stats, problem, problem.stats_terms())
    for residual in ("none", "normalised"):
        compare_reduce(problem, residual, True)
        compare(lambda p, residual=residual: apply(p, residual, residual == "none"), problem)


def test_zero_weight() -> None:
    problem = Problem(33, 8, torch.float32)
    problem.weight.zero_()
    problem.residual_weight.zero_()
    problem.compute_stats()
    assert not problem.stats[SCALE].any()
    for residual in ("plain", "normalised"):
        compare_reduce(problem, residual, True)
    _, problem.sums, problem.residual_sums = backward_reduce(problem, "normalised", False)
    for sums in (problem.sums, problem.residual_sums):
        assert sums[DWEIGHT].all() and not sums[SLOPE].any() and not sums[OFFSET].any()
    assert not any(gradient.any() for gradient in apply(problem, "normalised", False))


@residuals
@pytest.mark.parametrize(("count", "rows"), [(1, 7 * 257), (130, 130 * 257)])
def test_every_division_of_the_rows(
    count: int, rows: int, residual: str, multiprocessors: Callable[[int], None]
) -> None:
    """Several tiles a program, and more partial sums than the finalise kernels take at a time."""
    multiprocessors(count)
    problem = Problem(rows, 8, torch.float32)
    compare(compute_stats, problem, problem.stats_terms())
    compare_reduce(problem, residual, True)


@dtypes
def test_recomputed_mask_is_the_outputs_bit_for_bit(dtype: torch.dtype, gpu_backend: str) -> None:
    problem = Problem(1003, 8, dtype)
    # outputs on both sides of 0, many so small that float16 rounds them to 0
    problem.stats[SCALE] *= torch.logspace(-10, 0, 8)
    problem.stats[SHIFT] = -problem.x.flatten(2).median().item() * problem.stats[SCALE]
    z = forward(problem, "none", relu=True)
    problem.grad = torch.ones_like(problem.x)
    dx, _ = backward_apply(problem, "none", True, None, None)
    scale = _vector(problem.stats[SCALE]).expand_as(z)
    expected = torch.where(z <= 0, 0.0, scale).to(dtype)
    # the interpreter, unlike a GPU, cuts bfloat16 off
    cut = gpu_backend == "interpreted" and dtype == torch.bfloat16
    torch.testing.assert_close(dx, expected, rtol=torch.finfo(dtype).eps if cut else 0.0, atol=0.0)
    _, sums, _ = backward_reduce(problem, "none", True)
    assert torch.equal(sums[DBIAS], (z > 0).float().sum((0, 2, 3)))
    assert 0 < sums[DBIAS].sum() < z.numel()


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@residuals
def test_nan_and_inf(dtype: torch.dtype, value: float, residual: str) -> None:
    """A channel of the batch that isn't finite, elements behind finite statistics, and a NaN gradient."""
    problem = Problem(33, 8, dtype)
    problem.x[0, 1, 1, 1] = value
    compare(lambda p: compute_stats(p)[VAR:], problem, problem.stats_terms()[VAR:])
    problem.residual[0, 3, 1, 1] = value
    problem.grad[0, 2, 1, 1] = value
    problem.compute_outputs()
    relu = residual == "none"
    compare(lambda p: (forward(p, residual, True), *apply(p, residual, relu)), problem)
    compare_reduce(problem, residual, True)


@pytest.mark.parametrize("residual", ["none", "normalised"])
def test_running_mean_that_is_not_finite_reaches_no_other_sum(residual: str) -> None:
    problem = Problem(33, 8, torch.float32)
    problem.stats[MEAN] = problem.residual_stats[MEAN] = float("inf")
    problem.grad = torch.ones_like(problem.x)
    _, *both = backward_reduce(problem, residual, False)
    for sums in both[: 1 + (residual == "normalised")]:
        assert torch.equal(sums[DBIAS], torch.full((8,), 33.0)) and sums[DWEIGHT].isneginf().all()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("affine", [True, False])
def test_bn_running_stats(channels: int, affine: bool) -> None:
    problem = Problem(7, channels, torch.float32)

    def run(p: Problem) -> tuple[Tensor, ...]:
        params = (p.weight, p.bias) if affine else (None, None)
        return tuple(OPS.bn_running_stats(p.stats[MEAN], p.stats[VAR], *params, EPS))

    compare(run, problem)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_bn_update_running(channels: int, momentum: float) -> None:
    def run(p: Problem) -> tuple[Tensor, ...]:
        mean, var = p.bias.clone(), p.weight.abs()
        OPS.bn_update_running_(mean, var, p.stats, 7, momentum)
        return mean, var

    problem = Problem(7, channels, torch.float32)
    compare(run, problem)
    if momentum == 1.0:
        assert torch.equal(run(problem)[0], problem.stats[MEAN])


@dtypes
@pytest.mark.parametrize("residual", ["plain", "normalised"])
def test_outputs_may_overwrite_the_gradient(dtype: torch.dtype, residual: str) -> None:
    p = Problem(1003, 20, dtype)
    grad = p.grad.clone()
    du, *both = backward_reduce(p, residual, True)
    in_place = OPS.bn_act_backward_reduce_(grad, p.x, p.z[residual], p.stats, *p.branch(residual))
    assert torch.equal(grad, du)
    assert all(map(torch.equal, in_place, both))

    p.grad = du
    sums, residual_sums = both if residual == "normalised" else (both[0], None)
    dx, dresidual = backward_apply(p, residual, False, sums, residual_sums)
    arguments = (p.x, p.stats, sums, *p.branch(residual), residual_sums, False)
    assert torch.equal(OPS.bn_act_backward_apply_(grad, *arguments), dresidual)
    assert torch.equal(grad, dx)


@pytest.mark.parametrize("channels", [3, 64])
def test_nchw_and_strided_input_give_the_same_bits_in_channels_last(channels: int) -> None:
    p = Problem(33, channels, torch.float32)
    p.z = {k: z.contiguous() for k, z in p.z.items()}
    expected = results(p)
    wide = torch.zeros(1, 2 * channels, 3, 11)
    wide[:, ::2] = p.x
    for x in (p.x.contiguous(), wide[:, ::2]):
        p.x, p.residual, p.grad = x, p.residual.contiguous(), p.grad.contiguous()
        given = results(p)
        assert all(map(torch.equal, given, expected))
        activations = [t for t in given if t.dim() == 4]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in activations)


def test_same_bits_twice() -> None:
    p = Problem(1003, 20, torch.float16)
    assert all(map(torch.equal, results(p), results(p)))


def results(p: Problem) -> tuple[Tensor, ...]:
    """What every op gives, with a normalised residual and without one."""
    return (
        *compute_stats(p),
        *(forward(p, residual, True) for residual in RESIDUALS),
        *(t for residual in RESIDUALS for t in reduce(p, residual, True)),
        *apply(p, "none", True),
        *apply(p, "normalised", False),
    )


@dtypes
@relus
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("residual", "residual_training"),
    [("none", False), ("plain", False), ("normalised", False), ("normalised", True)],
)
def test_bn_act_through_autograd(
    dtype: torch.dtype, relu: bool, training: bool, residual: str, residual_training: bool
) -> None:
    """functional.bn_act against nn.BatchNorm2d, a sum and a ReLU: output, gradients and buffers."""
    p = Problem(1003, 20, dtype)

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        bn, residual_bn = (nn.BatchNorm2d(20, dtype=torch.promote_types(dtype, torch.float32)) for _ in "xr")
        sides = [(bn, p.weight, p.bias, p.stats, training)]
        if residual == "normalised":
            sides.append(
                (residual_bn, p.residual_weight, p.residual_bias, p.residual_stats, residual_training)
            )
        for module, weight, bias, stats, trained in sides:
            module.train(trained)
            with torch.no_grad():
                module.weight.copy_(weight)
                module.bias.copy_(bias)
                module.running_mean.copy_(stats[MEAN])
                module.running_var.copy_(stats[VAR])
        x, r = (t.detach().to(dtype).requires_grad_() for t in (p.x, p.residual))
        if fused:
            norms = [
                BatchNorm(m.weight, m.bias, m.running_mean, m.running_var, m.training) for m, *_ in sides
            ]
            z = fusedres.functional.bn_act(
                x,
                *norms[0][:4],
                residual=None if residual == "none" else r,
                residual_norm=norms[1] if residual == "normalised" else None,
                relu=relu,
                training=training,
            )
        else:
            added = {"none": lambda: 0.0, "plain": lambda: r, "normalised": lambda: residual_bn(r)}
            z = bn(x) + added[residual]()
            z = F.relu(z) if relu else z
        z.backward(p.grad.to(dtype))
        of_modules = [
            t for m, *_ in sides for t in (m.running_mean, m.running_var, m.weight.grad, m.bias.grad)
        ]
        return [z.detach(), *of_modules, x.grad, *([] if residual == "none" else [r.grad])]

    ours = run(True, dtype)
    eager, reference = run(False, dtype), run(False, torch.float64)
    for triple in zip(ours, eager, reference, strict=True):
        assert_close_to_reference(*triple, terms=p.terms(residual))
