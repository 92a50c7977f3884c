"""functional.conv_bn_act and the blocks, in each implementation, against float64."""

from __future__ import annotations

import os

import pytest
import torch
from chain_case import FLIPPED, KINDS, LAYOUTS, ChainCase, call, eager
from fused_ops import FusedOps

import fusedres
from fusedres import functional, kernels, plan
from fusedres.functional import BatchNorm, ConvNorm, Pad

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton's interpreter cuts bf16 off where a GPU rounds it
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param in kernels.unavailable():
        pytest.skip(kernels.unavailable()[request.param])
    with fusedres.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, kind, dtype, poisoned):
    for layout in LAYOUTS if not INTERPRETED else ["channels_last"]:
        ChainCase(kind, dtype, layout).check()


@pytest.mark.parametrize("training", [False, (False, True), (True, False), (True, True, False)], ids=str)
@pytest.mark.parametrize("kind", ["basic, projection", "bottleneck, projection", "plain"])
def test_each_batch_norm_follows_its_own_mode(backend, kind, training, poisoned):
    ChainCase(kind, torch.float32, training=training).check()


@pytest.mark.parametrize("kind", ["basic", "bottleneck, projection"])
def test_without_the_relu(backend, kind):
    ChainCase(kind, torch.float32, relu=False).check()


@pytest.mark.parametrize("kind", ["basic", "bottleneck, projection"])
def test_without_affine_parameters(backend, kind):
    ChainCase(kind, torch.float32, affine=False).check()


@pytest.mark.parametrize("kind", ["basic", "bottleneck, projection"])
def test_a_last_batch_norm_that_starts_at_zero(backend, kind):
    ChainCase(kind, torch.float32, zero=True).check()


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_mean_far_from_zero(backend, kind):
    """|mean| / std of the raw outputs far above 1: what is subtracted late is off by orders of magnitude."""
    ChainCase(kind, torch.float32, offset=300.0, size=(4, 7, 6)).check(times=4)


FROZEN = {
    "the input": ("dx",),
    "the first filters": ("dx", "dfilters0"),
    "the first convolution and its norm": ("dx", "dfilters0", "dweight0", "dbias0"),
    "all filters": ("dfilters0", "dfilters1", "dfilters2", "dfilters3"),
    "all but the last norm": ("dx", *(f"d{p}{i}" for i in (0, 1, 3) for p in ("filters", "weight", "bias")))
    + ("dfilters2",),
    "all but the projection": ("dx", *(f"d{p}{i}" for i in range(3) for p in ("filters", "weight", "bias"))),
    "a residual": ("dresidual",),
    "all but the input": tuple(f"d{p}{i}" for i in range(4) for p in ("filters", "weight", "bias")),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["bottleneck, projection", *([] if INTERPRETED else ["bottleneck, pooled"])])
def test_gradients_that_nobody_wants(backend, kind, frozen, training, poisoned):
    ChainCase(kind, torch.float32, frozen=FROZEN[frozen], training=training).check()


NORM_PARAMETERS = tuple(f"d{p}{i}" for i in range(4) for p in ("weight", "bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_batch_norms(backend, kind, dtype, poisoned):
    """As a detector is fine-tuned: the gradient goes through scales that have none."""
    ChainCase(kind, dtype, training=False, frozen=NORM_PARAMETERS).check()


@pytest.mark.parametrize("training", [(True, True, False, True), (True, True, True, False)], ids=str)
def test_one_fixed_batch_norm_at_the_end(backend, training, poisoned):
    fixed = training.index(False)
    frozen = (f"dweight{fixed}", f"dbias{fixed}")
    ChainCase("bottleneck, projection", torch.float32, training=training, frozen=frozen).check()


def test_what_nobody_wants_is_not_computed():
    with fusedres.backend("reference"), FusedOps() as ops:
        frozen = FROZEN["the first convolution and its norm"]
        ChainCase("bottleneck, projection", torch.float32, frozen=frozen, training=False).run(call)
    # the first forward is the case's own
    assert ops.calls["conv_dgrad"] == 1 and ops.calls["conv_wgrad"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_twice(backend, kind):
    case = ChainCase(kind, DTYPES[-1])
    first, second = case.run(call), case.run(call)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_gradients_accumulate_and_parameters_may_be_shared(backend):
    case = ChainCase("basic", torch.float32)
    conv = case.convs[0]
    norm = BatchNorm(conv.norm.weight.requires_grad_(), None, None, None, True)
    conv = conv._replace(weight=conv.weight.requires_grad_(), norm=norm)

    def gradients(run):
        for leaf in (conv.weight, norm.weight):
            leaf.grad = None
        for _ in range(2):
            run(case.x, [conv, conv], "identity", True, None).sum().backward()
        return conv.weight.grad, norm.weight.grad

    torch.testing.assert_close(gradients(call), gradients(eager), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's convolutions")
@pytest.mark.parametrize("settings", [{"groups": 4}, {"dilation": 2}], ids=str)
def test_groups_and_dilation_run_on_atens_convolution(backend, settings):
    channels = 16 // settings.get("groups", 1)
    weight = torch.randn(16, channels, 3, 3, requires_grad=True)
    norm = BatchNorm(torch.rand(16), torch.randn(16), None, None, True)
    x = torch.randn(2, 16, 6, 5)
    conv = ConvNorm(weight, norm, **settings)
    with FusedOps() as ops:
        out = call(x, [conv, conv], "identity", True, None)
    assert ops.calls["bn_act"] and not ops.calls["conv_fwd"]
    out.square().sum().backward()
    found, weight.grad = weight.grad, None
    expected = eager(x, [conv, conv], "identity", True, None)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-2)


def saved(run):
    """Bytes that a forward keeps for its backward in activations (4D, more than filters have)."""
    found = {}

    def pack(t):
        if t.dim() == 4 and t.shape[0] == 5:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(found.values()), out


@pytest.mark.parametrize("kind", ["basic", "basic, projection", "bottleneck"])
def test_what_is_saved(backend, kind):
    """x, the raw outputs and the output, in units of x; nothing between the convolutions."""
    case = ChainCase(kind, torch.float32, size=(5, 8, 8))
    x = case.x.requires_grad_()
    bytes_saved, out = saved(lambda: call(x, case.convs, *case.rest(torch.float32)))
    unit = x.numel() * 4
    expected = {
        "basic": 4,  # x, y1, y2, z
        "basic, projection": 1 + 4 * (24 / 16) / 4,  # and the projection's, at a quarter of the pixels
        "bottleneck": 1 + 0.25 + 0.25 + 1 + 1,
    }[kind]
    assert bytes_saved == expected * unit
    assert out.requires_grad


@pytest.mark.parametrize("kind", ["basic", "basic, projection", "bottleneck"])
def test_what_is_saved_of_fixed_batch_norms(backend, kind):
    """No more than eager PyTorch keeps: x, the raw outputs ahead of a convolution, and the output."""
    case = ChainCase(kind, torch.float32, size=(5, 8, 8), training=False)
    x = case.x.requires_grad_()
    for conv in case.convs:
        conv.weight.requires_grad_()
    bytes_saved, _ = saved(lambda: call(x, case.convs, *case.rest(torch.float32)))
    expected = {"basic": 3, "basic, projection": 1 + 2 * (24 / 16) / 4, "bottleneck": 1 + 0.25 + 0.25 + 1}[
        kind
    ]
    assert bytes_saved == expected * x.numel() * 4


def test_small_activations_are_atens_on_a_cpu():
    case = ChainCase("basic", torch.float32)
    with FusedOps() as ops:
        call(case.x, case.convs, *case.rest(torch.float32))
    assert not ops.calls


def test_a_gradient_penalty_raises(backend):
    case = ChainCase("basic", torch.float32)
    x = case.x.requires_grad_()
    out = call(x, case.convs, *case.rest(torch.float32))
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.square().sum().backward()


def test_under_a_transform_it_is_pytorchs_own(backend):
    case = ChainCase("basic", torch.float32, training=False)
    with FusedOps() as ops:
        grad = torch.func.grad(lambda x: call(x, case.convs, "identity", True, None).sum())(case.x)
    assert not ops.calls
    x = case.x.clone().requires_grad_()
    eager(x, case.convs, "identity", True, None).sum().backward()
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.skipif(INTERPRETED, reason="PyTorch's convolutions")
@pytest.mark.parametrize("kind", ["bottleneck, projection", "basic, pooled"])
def test_autocast(backend, kind):
    case = ChainCase(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = case.run(lambda *a: call(*a).float())
        theirs = case.run(lambda *a: eager(*a).float())
    reference = case.run(eager, torch.float64)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        error, allowed = ((t[name].double() - reference[name]).norm() for t in (ours, theirs))
        rounding = 1e-2 + FLIPPED * name.startswith("d")
        assert error <= 2 * allowed + rounding * reference[name].norm(), name


def conv(filters=8, channels=8, side=3, **settings):
    norm = BatchNorm(torch.ones(filters), torch.zeros(filters), None, None, True)
    return ConvNorm(torch.randn(filters, channels, side, side), norm, **settings)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda x: functional.basic_block(x, conv(), conv(16)),
            r"the shortcut gives .*8, 6, 5\], .*16, 6, 5\]",
        ),
        (
            lambda x: functional.basic_block(x, conv(), conv(channels=16)),
            r"conv2.weight must be \[K, 8 / groups",
        ),
        (lambda x: functional.bottleneck(x, conv(), conv(side=2), conv()), "conv2.weight .* with odd R"),
        (
            lambda x: functional.basic_block(x, conv(stride=2), conv(), conv(side=1)),
            r"the shortcut gives \[2, 8, 6, 5\], the convolutions \[2, 8, 3, 3\]",
        ),
        (
            lambda x: functional.basic_block(x, conv(), conv(), projected=x),
            "projected is for a shortcut that is a projection",
        ),
        (
            lambda x: functional.basic_block(x, conv(), conv(), conv(side=1), projected=x.double()),
            "projected must be 4D, torch.float32 and on cpu, as x, got 4D torch.float64",
        ),
        (
            lambda x: functional.basic_block(x, conv(), conv(), conv(side=1), projected=x[:1]),
            r"the shortcut gives \[1, 8, 6, 5\], the convolutions \[2, 8, 6, 5\]",
        ),
        (lambda x: functional.basic_block(x, conv(), conv(), Pad(3, 0, 0)), "pads with stride 1 or 2"),
        (
            lambda x: functional.conv_bn_act(x, conv(), residual=x[:1]),
            r"residual must be torch.float32 \[2, 8, 6, 5\]",
        ),
        (
            lambda x: functional.conv_bn_act(x, conv(), residual=x.to("meta")),
            r"residual must be .* on cpu, got .* on meta",
        ),
        (lambda x: functional.conv_bn_act(x[0], conv()), "x must be 4D"),
        (
            lambda x: functional.conv_bn_act(x, conv(stride=0)),
            "conv.stride and conv.dilation must be positive",
        ),
        (
            lambda x: functional.conv_bn_act(x, conv()._replace(norm=conv(16).norm)),
            r"conv.norm.weight must have one value per channel of x, \[8\], got \[16\]",
        ),
    ],
)
def test_wrong_arguments(run, message):
    with pytest.raises(ValueError, match=message):
        run(torch.randn(2, 8, 6, 5))


@pytest.mark.skipif(not INTERPRETED, reason="a forced kernel")
def test_a_forced_kernel_outside_its_contract_raises():
    x = torch.randn(2, 12, 6, 5)
    with (
        fusedres.backend("triton"),
        pytest.raises(RuntimeError, match="can't serve conv_fwd .* multiples of 8, got 12 and 8"),
    ):
        functional.conv_bn_act(x, conv(channels=12))


def test_least_values_are_those_of_the_smallest_output(monkeypatch):
    if "cpu" in kernels.unavailable():
        pytest.skip(kernels.unavailable()["cpu"])
    case = ChainCase("basic, projection", torch.float32, size=(4, 8, 8))
    smallest = 4 * 24 * 4 * 4
    for least, fused in ((smallest, True), (smallest + 1, False)):
        monkeypatch.setitem(plan.LEAST_VALUES, "cpu", least)
        x = case.x.clone().requires_grad_()
        out = call(x, case.convs, *case.rest(torch.float32))
        assert ("Fused" in type(out.grad_fn).__name__) == fused
