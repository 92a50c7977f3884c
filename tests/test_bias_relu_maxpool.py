"""The op bias_relu_maxpool in each implementation against float64 and PyTorch's own passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bn_case import DTYPES, LAYOUTS
from tolerances import assert_close_to_reference

import fusedres
from fusedres import kernels, ops, plan

SHAPES = [
    *[(2, 16, 9, 8), (1, 3, 7, 7), (2, 5, 1, 6), (3, 8, 2, 2), (1, 40, 1, 1), (2, 64, 19, 33)],
    *[(1, 1, 5, 70), (1, 9, 6, 1), (2, 24, 35, 4)],
]
OPS = torch.ops.fusedres
INF, NAN = float("inf"), float("nan")


def eager(x, bias):
    u = x if bias is None else x + bias.to(x.dtype).view(1, -1, 1, 1)
    return F.max_pool2d(F.relu(u), 3, 2, 1)


def rounded_once(x, bias):
    """What every implementation has to give, bit for bit: one addition and one rounding leave no choice."""
    return eager(x.float(), bias).to(x.dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(implementation, shape, dtype, layout, bias, poisoned):
    x = torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])
    b = torch.randn(shape[1]) if bias else None
    z = OPS.bias_relu_maxpool(x, b)
    assert_close_to_reference(z, eager(x, b), eager(x.double(), None if b is None else b.double()))
    assert torch.equal(z, rounded_once(x, b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(implementation, dtype, layout, poisoned):
    """A NaN of either sign in a window gives NaN, as do an infinite value and bias of opposite signs."""
    x = torch.randn(2, 20, 13, 10)
    x[0, 4, 2, 2], x[0, 4, 9, 9], x[1, 9, 0, 0] = NAN, INF, -INF
    x[1, 2, 12, 9] = torch.tensor(NAN).copysign(torch.tensor(-1.0))
    x[0, 7, 5, 5], x[0, 8, 5, 5] = INF, -INF
    x = x.to(dtype).to(memory_format=LAYOUTS[layout])
    bias = torch.randn(20)
    bias[7], bias[8], bias[11] = -INF, INF, NAN
    for b in (bias, None):
        z = OPS.bias_relu_maxpool(x, b)
        torch.testing.assert_close(z, rounded_once(x, b), rtol=0, atol=0, equal_nan=True)
        assert z.isnan().any()


def test_around_zero(implementation):
    """Zeros of both signs, and sums so small that float16 rounds them to 0."""
    for dtype in DTYPES:
        x = torch.tensor([0.0, -0.0, 1.0, -1.0])[torch.randint(0, 4, (2, 24, 9, 9))].to(dtype)
        for b in (torch.tensor([0.0, -0.0, 2.0**-26, -(2.0**-26), 1.0, -1.0]).repeat(4), None):
            z = OPS.bias_relu_maxpool(x.to(memory_format=torch.channels_last), b)
            assert torch.equal(z, rounded_once(x, b))


def test_threads_give_the_same_bits(implementation):
    x = torch.randn(3, 64, 45, 44).bfloat16().to(memory_format=torch.channels_last)
    bias = torch.randn(64)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(OPS.bias_relu_maxpool(x, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_another_layout(implementation):
    x = torch.randn(2, 9, 12, 10).mT
    bias = torch.randn(9)
    assert torch.equal(OPS.bias_relu_maxpool(x, bias), eager(x, bias))


def test_an_empty_batch(implementation):
    x = torch.randn(0, 8, 9, 7)
    assert OPS.bias_relu_maxpool(x, torch.randn(8)).shape == (0, 8, 5, 4)


def test_float64_and_where_no_kernel_serves():
    x, bias = torch.randn(2, 4, 6, 6).double(), torch.randn(4).double()
    assert torch.equal(OPS.bias_relu_maxpool(x, bias), eager(x, bias))
    choice = plan.choose(plan.Problem("bias_relu_maxpool", "cpu", "float32", interpreted=True), {}, "triton")
    assert choice[:2] == ("aten", "triton has no kernel for bias_relu_maxpool")
    cpu = plan.choose(plan.Problem("bias_relu_maxpool", "cpu", "float32"), {})
    assert cpu.implementation == "cpu" and "from 32,768 values" in cpu.reason
    device = torch.device("cpu")
    for forced, least in (("auto", 1 << 15), ("cpu", 0)):
        if "cpu" not in kernels.unavailable():
            assert ops.served_from("bias_relu_maxpool", device, torch.bfloat16, forced) == least
    cuda = plan.Problem("bias_relu_maxpool", "cuda", "bfloat16", (9, 0))
    assert plan.choose(cuda, {}).implementation == "cuda"


def test_errors_name_the_argument():
    x = torch.zeros(2, 4, 6, 6)
    with fusedres.backend("reference"):
        with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[2, 4\]"):
            OPS.bias_relu_maxpool(x[:, :, 0, 0], None)
        with pytest.raises(ValueError, match=r"bias must be contiguous, \[4\] on cpu, got \[3\]"):
            OPS.bias_relu_maxpool(x, torch.ones(3))
        with pytest.raises(ValueError, match=r"bias must be contiguous, .* with strides \(2,\)"):
            OPS.bias_relu_maxpool(x, torch.ones(8)[::2])
        with pytest.raises(TypeError, match=r"bias must be torch.float32, got torch.bfloat16"):
            OPS.bias_relu_maxpool(x.bfloat16(), torch.ones(4).bfloat16())
        with pytest.raises(TypeError, match=r"bias must be torch.float64, got torch.float32"):
            OPS.bias_relu_maxpool(x.double(), torch.ones(4))
