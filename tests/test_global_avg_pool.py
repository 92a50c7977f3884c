"""functional.global_avg_pool against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bn_case import DTYPES, LAYOUTS
from fused_ops import FusedOps
from torch import nn

import fusedres
from fusedres.functional import global_avg_pool
from fusedres.nn import global_avg_pool as pool_by


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(implementation, dtype, layout):
    x = torch.randn(3, 20, 5, 7).to(dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out = global_avg_pool(x)
    out.backward(torch.ones_like(out) * 3)
    expected = F.adaptive_avg_pool2d(y, 1)
    expected.backward(torch.ones_like(expected) * 3)
    assert out.shape == (3, 20, 1, 1) and out.dtype == dtype
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, y.grad)


def test_float64_is_pytorchs_own():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(global_avg_pool(x), F.adaptive_avg_pool2d(x, 1))


def test_many_16_bit_values_are_summed_in_float32(implementation):
    x = torch.full((1, 8, 64, 64), 1.0, dtype=torch.float16) + torch.eye(64, dtype=torch.float16)
    assert torch.equal(global_avg_pool(x), torch.full((1, 8, 1, 1), 1 + 1 / 64, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 130, 7, 7), (3, 1000, 2, 3), (1, 520, 9, 1)], ids=str)
def test_shapes(implementation, shape, poisoned):
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    grad = torch.randn(*shape[:2], 1, 1)
    global_avg_pool(x).backward(grad)
    F.adaptive_avg_pool2d(y, 1).backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(global_avg_pool(x), F.adaptive_avg_pool2d(y, 1))


def test_double_backward_raises():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    with fusedres.backend("reference"):
        (dx,) = torch.autograd.grad(global_avg_pool(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            dx.sum().backward()


def test_errors():
    with pytest.raises(ValueError, match=r"x must be 4D, \[N, C, H, W\], got 3D \[2, 3, 4\]"):
        global_avg_pool(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        global_avg_pool(torch.zeros(2, 3, 4, 4, dtype=torch.int64))


def test_module_is_fused_only_if_it_is_the_global_one():
    x = torch.randn(2, 4, 6, 6)
    for pool, fused in (
        (nn.AdaptiveAvgPool2d((1, 1)), 1),
        (nn.AdaptiveAvgPool2d(1), 1),
        (nn.AdaptiveAvgPool2d(2), 0),
        (nn.AvgPool2d(6), 0),
    ):
        with fusedres.backend("reference"), FusedOps() as seen:
            out = pool_by(pool, x)
        torch.testing.assert_close(out, pool(x))
        assert seen.calls["global_avg_pool"] == fused
