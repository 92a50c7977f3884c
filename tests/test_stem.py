"""functional.stem in each implementation that has its convolution, against float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED, INTERPRETED
from fused_ops import FusedOps
from torch import nn

import fusedres
from fusedres.functional import BatchNorm, ConvNorm, stem
from fusedres.nn import stem as stem_of

BACKEND = "triton" if INTERPRETED else "reference"
# emulated tensor cores round float32; Triton's interpreter cuts bf16 off where a GPU rounds it
DTYPES = [
    *([] if EMULATED else [torch.float32]),
    torch.float16,
    *([] if INTERPRETED else [torch.bfloat16]),
]
FLIPPED = 0.1  # error of a gradient by a few values that passed the ReLU, or didn't, by rounding


@contextlib.contextmanager
def implementation():
    """That of this process: PyTorch's own, Triton's in its interpreter, or CUDA's in the emulation."""
    if EMULATED:
        from emulation.cuda_on_cpu import cuda_on_cpu

        with cuda_on_cpu():
            yield
    else:
        with fusedres.backend(BACKEND):
            yield


def eager(x, conv):
    out = F.conv2d(x, conv.weight, None, 2, 3)
    return F.max_pool2d(F.relu(conv.norm.plain(out)), 3, 2, 1)


def run(function, x, conv, dtype, needs_dx=False):
    """Output, gradients and running statistics, in the precision of ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = conv.weight.to(dtype, copy=True).requires_grad_()
    gamma, beta, mean, var = (t.to(wide, copy=True) for t in conv.norm[:4])
    norm = BatchNorm(gamma.requires_grad_(), beta.requires_grad_(), mean, var, conv.norm.training)
    x = x.to(dtype, copy=True).requires_grad_(needs_dx)
    out = function(x, ConvNorm(weight, norm, 2))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad.to(out.dtype))
    results = {"out": out.detach(), "mean": mean, "var": var}
    leaves = {"dfilters": weight, "dweight": gamma, "dbias": beta} | ({"dx": x} if needs_dx else {})
    return results | {name: leaf.grad for name, leaf in leaves.items()}


def case(size=(2, 3, 13, 10), filters=16, training=True, layout=torch.channels_last):
    x = torch.randn(size).to(memory_format=layout)
    weight = (torch.randn(filters, 3, 7, 7) / 12).to(memory_format=layout)
    norm = BatchNorm(
        torch.rand(filters) + 0.5, torch.randn(filters), torch.randn(filters), torch.ones(filters), training
    )
    return x, ConvNorm(weight, norm, 2)


def check(x, conv, dtype, needs_dx=False):
    ours = run(stem, x, conv, dtype, needs_dx)
    theirs, exact = (
        run(eager, x.to(dtype), conv._replace(weight=conv.weight.to(dtype)), d, needs_dx)
        for d in (dtype, torch.float64)
    )
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape
        norm = exact[name].norm()
        error, allowed = ((t[name].double() - exact[name]).norm() for t in (ours, theirs))
        allowed = 2 * allowed + (torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps) * norm
        if name.startswith("d") and dtype != torch.float32:
            allowed += FLIPPED * norm
        assert error <= allowed, f"{name} is off by {error / norm:.3g}, allowed {allowed / norm:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_values_and_gradients(dtype, training, layout, poisoned):
    with implementation(), FusedOps() as ops:
        check(*case(training=training, layout=layout), dtype)
    assert ops.calls["stem_conv"] == ops.calls["stem_wgrad"] == 1


@pytest.mark.parametrize("size", [(1, 3, 7, 7), (3, 3, 8, 9)], ids=str)
def test_sizes(size, poisoned):
    with implementation():
        check(*case(size=size), DTYPES[0])


def test_images_that_need_a_gradient_run_on_pytorchs_convolution():
    with implementation(), FusedOps() as ops:
        check(*case(), torch.float32, needs_dx=True)
    assert not ops.calls["stem_conv"] and ops.calls["bn_act"] + ops.calls["bn_relu_maxpool"] == 1


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's convolution")
def test_other_channels_run_on_pytorchs_convolution():
    x, conv = torch.randn(2, 4, 9, 9), case()[1]
    with implementation(), FusedOps() as ops:
        stem(x, conv._replace(weight=torch.randn(16, 4, 7, 7)))
    assert not ops.calls["stem_conv"]


def test_frozen_filters_have_no_backward():
    x, conv = case()
    norm = conv.norm._replace(weight=conv.norm.weight.requires_grad_())
    with implementation(), FusedOps() as ops:
        stem(x, conv._replace(norm=norm)).sum().backward()
    assert ops.calls["stem_conv"] == 1 and not ops.calls["stem_wgrad"] and norm.weight.grad is not None


@pytest.mark.skipif(INTERPRETED, reason="bf16")
def test_autocast_casts_image_and_filters_on_the_way():
    x, conv = case()
    with implementation(), torch.autocast("cpu", torch.bfloat16), FusedOps() as ops:
        ours = run(lambda *a: stem(*a).float(), x, conv, torch.float32)
        assert ops.calls["stem_conv"] == 1
        theirs = run(lambda *a: eager(*a).float(), x, conv, torch.float32)
    exact = run(eager, x, conv, torch.float64)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        error, allowed = ((t[name].double() - exact[name]).norm() for t in (ours, theirs))
        assert error <= 2 * allowed + FLIPPED * exact[name].norm(), name


def test_a_gradient_penalty_raises():
    x, conv = case()
    weight = conv.weight.requires_grad_()
    with implementation():
        (dw,) = torch.autograd.grad(stem(x, conv).square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated again"):
            dw.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 1}, "of stride 2"),
        ({"weight": torch.randn(16, 3, 5, 5)}, r"conv must be \[K, 3, 7, 7\] of stride 2"),
        ({"norm": BatchNorm(torch.ones(8), None, None, None, True)}, r"conv.norm.weight must have .*\[16\]"),
    ],
)
def test_wrong_arguments(change, message):
    x, conv = case()
    with pytest.raises(ValueError, match=message):
        stem(x, conv._replace(**change))


CHILDREN = {
    "as it is": ({}, True),
    "a bias": ({0: nn.Conv2d(3, 8, 7, 2, 3)}, False),
    "another padding": ({0: nn.Conv2d(3, 8, 7, 2, 2, bias=False)}, False),
    "another norm": ({1: nn.GroupNorm(2, 8)}, False),
    "another activation": ({2: nn.GELU()}, False),
    "another pool": ({3: nn.MaxPool2d(2)}, False),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_children(name):
    changes, fused = CHILDREN[name]
    children = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for place, child in changes.items():
        children[place] = child
    x = torch.randn(2, 3, 16, 16)
    with implementation(), FusedOps() as ops:
        out = stem_of(*children, x)
    assert ops.calls["stem_conv"] == fused
    torch.testing.assert_close(out, nn.Sequential(*children)(x), rtol=1e-3, atol=1e-3)


def test_a_hook_of_the_convolution_is_called():
    model = fusedres.resnet18(num_classes=2)
    called = []
    model.conv1.register_forward_hook(lambda *_: called.append(1))
    with fusedres.backend("reference"), FusedOps() as ops, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert called == [1] and not ops.calls["stem_conv"]
