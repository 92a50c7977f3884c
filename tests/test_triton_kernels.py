"""The Triton kernels' numbers, on a CPU: TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py

Triton reads the variable when it is imported, so these tests need a process of their own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from torch import Tensor, nn

import fusedres
from fusedres.kernels.rows import DBIAS, DWEIGHT, MEAN, RSTD, SCALE, SHIFT, VAR

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"
)

OPS = torch.ops.fusedres
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS = [1, 3, 8, 20, 64, 130]
IMAGES = {1: (1, 1, 1), 7: (7, 1, 1), 33: (1, 3, 11), 1003: (17, 59, 1)}  # rows: N, H, W
FLAGS = [(residual, relu) for residual in (False, True) for relu in (False, True)]


def _full_of_nan(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(empty)
    def fresh(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return fresh


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an element nobody writes shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _full_of_nan(getattr(owner, name)))


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with fusedres.backend("triton"):
        yield


class Problem:
    """Inputs of every op for one shape; ``double()`` is the same problem in float64."""

    def __init__(
        self, rows: int, channels: int, dtype: torch.dtype, mean: float = 0.5, std: float = 2.0
    ) -> None:
        torch.manual_seed(rows * 1000 + channels)
        n, h, w = IMAGES[rows]

        def activation() -> Tensor:
            return torch.randn(n, channels, h, w).to(memory_format=torch.channels_last)

        self.x = (activation() * std + mean).to(dtype)
        self.residual = activation().to(dtype)
        self.weight, self.bias = torch.randn(channels), torch.randn(channels)
        with fusedres.backend("reference"):
            self.stats = OPS.bn_stats(self.x, self.weight, self.bias, EPS)
            self.z = OPS.bn_act(self.x, self.stats, self.residual, True)
        # a gradient only where rounding can't decide on which side of the ReLU an element lies
        u = self.x.double() * _vector(self.stats[SCALE]) + _vector(self.stats[SHIFT])
        decided = (u.abs() > 1e-2) & ((u + self.residual).abs() > 1e-2)
        self.grad = torch.where(decided, activation(), 0.0).to(dtype)
        with fusedres.backend("reference"):
            self.sums = OPS.bn_act_backward_reduce(self.grad, self.x, self.z, self.stats, True)[1]
        # the larger of the two terms of an output
        self.terms = _largest(self.x.float() * _vector(self.stats[SCALE]))

    def stats_terms(self) -> list[float]:
        """What the rows of stats are added up from; PyTorch's own sums on a CPU are float64 inside."""
        centred = self.x.float() - _vector(self.stats[MEAN])
        return [_largest(centred), *(3 * _largest(row) for row in self.stats[1:])]

    def sums_terms(self) -> list[float]:
        """The same for dbias and dweight: row after row, each with a rounding of random sign."""
        du = torch.where(self.z <= 0, 0.0, self.grad).float()
        normalized = (self.x.float() - _vector(self.stats[MEAN])) * _vector(self.stats[RSTD])
        sizes = (torch.linalg.vector_norm(t, dim=(0, 2, 3)) for t in (self.grad.float(), du * normalized))
        rows = self.x.numel() // self.x.shape[1]
        return [0.5 * rows**0.5 * _largest(size) for size in sizes]

    def double(self) -> Problem:
        other = object.__new__(Problem)
        other.__dict__ = {k: v.double() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return other


def _vector(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _largest(t: Tensor) -> float:
    return t[t.isfinite()].abs().max().item()


def compare(
    run: Callable[[Problem], tuple[Tensor, ...]], problem: Problem, terms: list[float] | None = None
) -> None:
    """Hold each result of ``run`` under Triton to the float64 reference."""
    ours = run(problem)
    with fusedres.backend("reference"):
        eager, reference = run(problem), run(problem.double())
    for *results, size in zip(ours, eager, reference, terms or [0.0] * len(ours), strict=True):
        assert_close_to_reference(*results, terms=size)


def compute_stats(p: Problem) -> tuple[Tensor, ...]:
    return tuple(OPS.bn_stats(p.x, p.weight, p.bias, EPS))


def reduce(p: Problem, residual: bool, relu: bool) -> tuple[Tensor, ...]:
    du, sums = OPS.bn_act_backward_reduce(p.grad, p.x, p.z if residual else None, p.stats, relu)
    return du, *sums


def apply(p: Problem, relu: bool) -> tuple[Tensor, ...]:
    """With sums, as behind the batch's statistics, and without, as behind frozen ones."""
    return tuple(OPS.bn_act_backward_apply(p.grad, p.x, p.stats, sums, relu) for sums in (p.sums, None))


shapes = pytest.mark.parametrize(("rows", "channels"), [(m, c) for m in IMAGES for c in CHANNELS])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
@pytest.mark.parametrize(("residual", "relu"), FLAGS)
def test_bn_act(rows: int, channels: int, dtype: torch.dtype, residual: bool, relu: bool) -> None:
    problem = Problem(rows, channels, dtype)
    compare(
        lambda p: (OPS.bn_act(p.x, p.stats, p.residual if residual else None, relu),),
        problem,
        [problem.terms],
    )


@shapes
@dtypes
@pytest.mark.parametrize(("residual", "relu"), FLAGS)
def test_bn_act_backward_reduce(
    rows: int, channels: int, dtype: torch.dtype, residual: bool, relu: bool
) -> None:
    problem = Problem(rows, channels, dtype)
    compare(lambda p: reduce(p, residual, relu), problem, [0.0, *problem.sums_terms()])


@shapes
@dtypes
@pytest.mark.parametrize("relu", [False, True])
def test_bn_act_backward_apply(rows: int, channels: int, dtype: torch.dtype, relu: bool) -> None:
    compare(lambda p: apply(p, relu), Problem(rows, channels, dtype))


def test_values_far_from_zero() -> None:
    problem = Problem(1003, 20, torch.float32, mean=1e3, std=1.0)
    compare(compute_stats, problem, problem.stats_terms())
    compare(lambda p: reduce(p, False, True), problem, [0.0, *problem.sums_terms()])
    compare(lambda p: apply(p, True), problem)


def test_zero_weight() -> None:
    problem = Problem(33, 8, torch.float32)
    problem.weight.zero_()
    problem.stats = OPS.bn_stats(problem.x, problem.weight, problem.bias, EPS)
    assert not problem.stats[SCALE].any()
    compare(lambda p: reduce(p, True, True), problem, [0.0, *problem.sums_terms()])
    assert OPS.bn_act_backward_reduce(problem.grad, problem.x, None, problem.stats, False)[1][DWEIGHT].all()
    assert not any(dx.any() for dx in apply(problem, False))


@pytest.mark.parametrize("programs", [3, 130])
def test_every_division_of_the_rows(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, and more partial sums than the finalise kernels take at a time."""
    from fusedres.kernels.triton import config

    tile = config.CONFIGS["bn_stats"][-1]
    monkeypatch.setattr(config, "_facts", lambda device: (config.MIN_ARCH, programs))
    monkeypatch.setitem(IMAGES, 0, (1, programs, tile.block_m + 1))
    config.launch.cache_clear()
    try:
        problem = Problem(0, tile.block_c, torch.float32)
        compare(compute_stats, problem, problem.stats_terms())
        compare(lambda p: reduce(p, False, True), problem, [0.0, *problem.sums_terms()])
    finally:
        config.launch.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputed_mask_is_the_outputs_bit_for_bit(dtype: torch.dtype) -> None:
    problem = Problem(1003, 8, dtype)
    # outputs on both sides of 0, many so small that float16 rounds them to 0
    problem.stats[SCALE] *= torch.logspace(-10, 0, 8)
    problem.stats[SHIFT] = -problem.x.flatten(2).median().item() * problem.stats[SCALE]
    z = OPS.bn_act(problem.x, problem.stats, None, True)
    ones = torch.ones_like(problem.x)
    dx = OPS.bn_act_backward_apply(ones, problem.x, problem.stats, None, True)
    scale = _vector(problem.stats[SCALE]).expand_as(z)
    expected = torch.where(z <= 0, 0.0, scale).to(dtype)
    # the interpreter, unlike a GPU, cuts bfloat16 off where it should round
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(dx, expected, rtol=rounding, atol=0.0)
    _, sums = OPS.bn_act_backward_reduce(ones, problem.x, None, problem.stats, True)
    assert torch.equal(sums[DBIAS], (z > 0).float().sum((0, 2, 3)))
    assert 0 < sums[DBIAS].sum() < z.numel()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, as it interprets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("residual", [False, True])
def test_nan_and_inf(dtype: torch.dtype, value: float, residual: bool) -> None:
    """A channel of the batch that isn't finite, an element behind finite statistics, and a NaN gradient."""
    problem = Problem(33, 8, dtype)
    problem.x[0, 1, 1, 1] = value
    compare(lambda p: compute_stats(p)[VAR:], problem, problem.stats_terms()[VAR:])
    problem.grad[0, 2, 1, 1] = value
    compare(
        lambda p: (OPS.bn_act(p.x, p.stats, p.residual if residual else None, True), *apply(p, not residual)),
        problem,
    )
    compare(lambda p: reduce(p, residual, True), problem, [0.0, *problem.sums_terms()])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_running_mean_that_is_not_finite_reaches_no_other_sum() -> None:
    problem = Problem(33, 8, torch.float32)
    problem.stats[MEAN] = float("inf")
    grad = torch.ones_like(problem.x)
    _, sums = OPS.bn_act_backward_reduce(grad, problem.x, None, problem.stats, False)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_overwrite_the_gradient(dtype: torch.dtype) -> None:
    p = Problem(1003, 20, dtype)
    z = OPS.bn_act(p.x, p.stats, p.residual, True)
    du, sums = OPS.bn_act_backward_reduce(p.grad, p.x, z, p.stats, True)
    dx = OPS.bn_act_backward_apply(du, p.x, p.stats, sums, False)
    grad = p.grad.clone()
    assert torch.equal(OPS.bn_act_backward_reduce_(grad, p.x, z, p.stats), sums)
    assert torch.equal(grad, du)
    OPS.bn_act_backward_apply_(grad, p.x, p.stats, sums, False)
    assert torch.equal(grad, dx)


@pytest.mark.parametrize("channels", [3, 64])
def test_nchw_and_strided_input_give_the_same_bits_in_channels_last(channels: int) -> None:
    p = Problem(33, channels, torch.float32)
    wide = torch.zeros(1, 2 * channels, 3, 11)
    wide[:, ::2] = p.x
    for x in (p.x.contiguous(), wide[:, ::2]):
        assert torch.equal(OPS.bn_stats(x, p.weight, p.bias, EPS), OPS.bn_stats(p.x, p.weight, p.bias, EPS))
        z = OPS.bn_act(x, p.stats, p.residual.contiguous(), True)
        assert torch.equal(z, OPS.bn_act(p.x, p.stats, p.residual, True))
        assert z.is_contiguous(memory_format=torch.channels_last)
        dx = OPS.bn_act_backward_apply(p.grad.contiguous(), x, p.stats, None, True)
        assert torch.equal(dx, OPS.bn_act_backward_apply(p.grad, p.x, p.stats, None, True))


def test_same_bits_twice() -> None:
    p = Problem(1003, 130, torch.float16)

    def run() -> tuple[Tensor, ...]:
        stats = OPS.bn_stats(p.x, p.weight, p.bias, EPS)
        return stats, OPS.bn_act(p.x, stats, p.residual, True), *reduce(p, True, True), *apply(p, True)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("residual", "relu"), FLAGS)
@pytest.mark.parametrize("training", [True, False])
def test_bn_act_through_autograd(dtype: torch.dtype, residual: bool, relu: bool, training: bool) -> None:
    """functional.bn_act against nn.BatchNorm2d, a sum and a ReLU: output, gradients and buffers."""
    p = Problem(1003, 20, dtype)

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        bn = nn.BatchNorm2d(20, dtype=torch.promote_types(dtype, torch.float32)).train(training)
        with torch.no_grad():
            bn.weight.copy_(p.weight)
            bn.bias.copy_(p.bias)
            bn.running_mean.copy_(p.stats[MEAN])
            bn.running_var.copy_(p.stats[VAR])
        x, r = (t.detach().to(dtype).requires_grad_() for t in (p.x, p.residual))
        if fused:
            z = fusedres.functional.bn_act(
                *(x, bn.weight, bn.bias, bn.running_mean, bn.running_var),
                residual=r if residual else None,
                relu=relu,
                training=training,
            )
        else:
            z = bn(x) + (r if residual else 0.0)
            z = F.relu(z) if relu else z
        z.backward(p.grad.to(dtype))
        grads = [x.grad, bn.weight.grad, bn.bias.grad] + ([r.grad] if residual else [])
        return [z.detach(), bn.running_mean, bn.running_var, *grads]

    ours = run(True, dtype)
    eager, reference = run(False, dtype), run(False, torch.float64)
    for results in zip(ours, eager, reference, strict=True):
        assert_close_to_reference(*results, terms=p.terms)
