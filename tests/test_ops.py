"""Every registered op: schema, fake, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from op_case import LAYOUTS, activation, arguments, is_activation

import fusedres
from fusedres import ops, plan
from fusedres.kernels.rows import STATS_ROWS, SUMS_ROWS

OPS = torch.ops.fusedres


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_opcheck(name, dtype, layout):
    op = getattr(OPS, name).default
    for args in arguments(name, dtype, layout):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", ops.OPS)
def test_fake_has_the_strides_of_the_real_op(name):
    """Also for a layout that is neither, and with a forced backend's own layout."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    in_place = name in ("bn_act_backward_reduce_", "bn_act_backward_apply_")
    for args in arguments(name, layout="nchw"):
        # what is written over has to be in the layout already
        args = [
            a
            if not is_activation(a) or name == "stem_wgrad"
            else a.mT.contiguous()
            if in_place and i == 0
            else a.mT
            for i, a in enumerate(args)
        ]
        op = getattr(OPS, name)
        with FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            fake = op(*fakes)
        real = op(*args)
        if real is None:
            assert fake is None
            continue
        for r, f in zip(*((o if isinstance(o, tuple | list) else (o,)) for o in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_every_op_has_an_implementation_on_every_backend_that_claims_it():
    from fusedres import kernels

    for name, served in plan.OPS.items():
        if name in kernels.unavailable():
            continue
        for op in served:
            assert callable(getattr(kernels.load(name), op)), (name, op)
    assert set(plan.BN_OPS) <= set(ops.OPS)


def test_what_is_written_over_has_to_be_in_the_layout_of_x():
    for args in arguments("bn_act_backward_apply_"):
        with pytest.raises(ValueError, match="grad is written over, so it must be in the layout of x"):
            OPS.bn_act_backward_apply_(args[0].contiguous(), *args[1:])


def test_refusals():
    x = activation()
    stats = OPS.bn_stats(x, None, None, 1e-5)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[2, 5\]"):
        OPS.bn_act(torch.randn(2, 5), stats, None, None, True)
    with pytest.raises(ValueError, match=r"stats must be contiguous, \[5, 5\] on cpu, got \[5, 4\]"):
        OPS.bn_act(x, torch.zeros(STATS_ROWS, 4), None, None, True)
    with pytest.raises(TypeError, match="stats must be torch.float32, got torch.float64"):
        OPS.bn_act(x, stats.double(), None, None, True)
    with pytest.raises(ValueError, match=r"residual must have the shape and device of x, \[2, 5, 4, 3\]"):
        OPS.bn_act(x, stats, x[:1], None, True)
    with pytest.raises(ValueError, match="residual_stats needs a residual"):
        OPS.bn_act(x, stats, None, stats, True)
    no_branch = (None, None, None)
    with pytest.raises(TypeError, match="grad must have the dtype of x, torch.float32, got torch.bfloat16"):
        OPS.bn_act_backward_apply(x.bfloat16(), x, stats, None, *no_branch, True)
    with pytest.raises(ValueError, match="relu must be False with a residual"):
        OPS.bn_act_backward_apply(x, x, stats, None, x, stats, None, True)
    with pytest.raises(ValueError, match="residual needs residual_stats"):
        OPS.bn_act_backward_reduce(x, x, x, stats, x, None, True)
    with pytest.raises(ValueError, match="z must be given where a residual went through the ReLU"):
        OPS.bn_act_backward_reduce(x, x, None, stats, x, stats, True)
    with pytest.raises(ValueError, match="z is for the mask of a ReLU, and there is none"):
        OPS.bn_act_backward_reduce(x, x, x, stats, None, None, False)
    with pytest.raises(ValueError, match="count must be at least 2 values per channel, got 1"):
        OPS.bn_update_running_(torch.zeros(5), torch.ones(5), stats, 1, 0.1)
    with pytest.raises(ValueError, match=r"weight must be contiguous"):
        OPS.bn_stats(x, torch.ones(10)[::2], None, 1e-5)


def test_refusals_of_the_pools_and_casts():
    x = activation()
    stats = OPS.bn_stats(x, None, None, 1e-5)
    z, index = OPS.bn_relu_maxpool(x, stats)
    with pytest.raises(ValueError, match=r"grad must be \[2, 5, 2, 2\] on cpu, got \[2, 5, 4, 3\]"):
        OPS.bn_relu_maxpool_backward_reduce(x, index, x, stats)
    with pytest.raises(TypeError, match="index must be torch.uint8, got torch.int64"):
        OPS.bn_relu_maxpool_backward_apply(z, index.long(), x, stats, None)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[5, 4, 3\]"):
        OPS.global_avg_pool(x[0])
    with pytest.raises(ValueError, match=r"grad must be \[N, C, 1, 1\], got \[2, 5, 4, 3\]"):
        OPS.global_avg_pool_backward(x, 4, 3)
    with pytest.raises(ValueError, match=r"weights must be 4D torch.float32, got 4D .* torch.bfloat16"):
        OPS.cast_weights([x.bfloat16()], torch.bfloat16)
    with pytest.raises(TypeError, match="dtype must be torch.bfloat16 or torch.float16, got torch.float64"):
        OPS.cast_weights([x], torch.float64)


def test_refusals_of_the_convolutions():
    x, weight = activation(), torch.randn(4, 5, 3, 3)
    stats = OPS.bn_stats(x, None, None, 1e-5)
    fwd = (False, weight, 1, None, None, 1e-5, False)
    with pytest.raises(
        ValueError, match=r"weight must be \[K, 5, 1, 1\] or \[K, 5, 3, 3\], got \[4, 5, 5, 5\]"
    ):
        OPS.conv_fwd(x, None, None, None, False, torch.randn(4, 5, 5, 5), *fwd[2:])
    with pytest.raises(TypeError, match=r"weight must be torch.float32, got torch.bfloat16"):
        OPS.conv_fwd(x, None, None, None, False, weight.bfloat16(), *fwd[2:])
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        OPS.conv_fwd(x, None, None, None, False, weight, 3, *fwd[3:])
    with pytest.raises(ValueError, match="a residual needs stats, and a 1x1 convolution of stride 1"):
        OPS.conv_fwd(x, stats, x, None, *fwd)
    with pytest.raises(ValueError, match=r"du must be \[2, 4, 4, 3\] on cpu, got \[2, 5, 4, 3\]"):
        OPS.conv_wgrad(x, None, None, None, x, None, False, weight, 1)
    du = activation((2, 4, 4, 3))
    with pytest.raises(ValueError, match="y_sums needs y and y_stats"):
        OPS.conv_wgrad(du, None, None, torch.zeros(SUMS_ROWS, 4), x, None, False, weight, 1)
    no_x = (None, None, False, False)
    with pytest.raises(ValueError, match=r"add must be \[2, C, 4, 3\] or every second pixel of it"):
        OPS.conv_dgrad(du, None, None, None, weight, 1, 4, 3, activation((2, 5, 3, 3)), 0, *no_x)
    with pytest.raises(ValueError, match="add has no 5 channels from 1 on"):
        OPS.conv_dgrad(du, None, None, None, weight, 1, 4, 3, x, 1, *no_x)
    with pytest.raises(ValueError, match="x and x_stats must both be given"):
        OPS.conv_dgrad(du, None, None, None, weight, 1, 4, 3, None, 0, x, None, True, False)


def test_refusals_of_a_trained_nets_ops():
    x, weight, bias = activation(), torch.randn(4, 5, 3, 3), torch.randn(4)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got \[5, 4, 3\]"):
        OPS.conv_bias_act(x[0], weight, bias, None, True, 1)
    with pytest.raises(ValueError, match=r"weight must be \[K, 5, 1, 1\] or \[K, 5, 3, 3\]"):
        OPS.conv_bias_act(x, torch.randn(4, 5, 7, 7), bias, None, True, 1)
    with pytest.raises(TypeError, match=r"weight must be torch.float32, got torch.bfloat16"):
        OPS.conv_bias_act(x, weight.bfloat16(), bias, None, True, 1)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        OPS.conv_bias_act(x, weight, bias, None, True, 3)
    with pytest.raises(ValueError, match=r"bias must be contiguous, \[4\] on cpu, got \[5\]"):
        OPS.conv_bias_act(x, weight, torch.randn(5), None, True, 1)
    with pytest.raises(TypeError, match="bias must be torch.float32, got torch.bfloat16"):
        OPS.conv_bias_act(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), None, True, 1)
    with pytest.raises(TypeError, match="bias must be torch.float64, got torch.float32"):
        OPS.conv_bias_act(x.double(), weight.double(), bias, None, True, 1)
    with pytest.raises(ValueError, match=r"residual must be \[2, 4, 4, 3\] on cpu, got \[2, 5, 4, 3\]"):
        OPS.conv_bias_act(x, weight, bias, x, True, 1)
    with pytest.raises(TypeError, match="residual must be torch.float32, got torch.float16"):
        OPS.conv_bias_act(x, weight, bias, activation((2, 4, 4, 3), torch.float16), True, 1)


def test_refusals_of_the_stem():
    x, weight = activation((1, 3, 9, 8)), torch.randn(4, 3, 7, 7)
    run = {"bias": None, "mean": None, "std": None, "pool": True, "dtype": torch.float32}
    for change, error, message in (
        ({"mean": [0.0] * 3}, ValueError, "mean and std go together"),
        ({"mean": [0.0] * 3, "std": [1.0]}, ValueError, "std must have 3 values, got 1"),
        ({"bias": torch.randn(5)}, ValueError, r"bias must be contiguous, \[4\] on cpu, got \[5\]"),
        ({"dtype": torch.float64, "bias": torch.randn(4)}, TypeError, "bias must be torch.float64"),
    ):
        with pytest.raises(error, match=message):
            OPS.stem_bias_act(x, weight, *(run | change).values())
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\], got \[1, 5, 9, 8\]"):
        OPS.stem_bias_act(activation((1, 5, 9, 8)), weight, *run.values())
    with pytest.raises(ValueError, match=r"weight must be \[K, 3, 7, 7\], got \[4, 3, 5, 5\]"):
        OPS.stem_bias_act(x, torch.randn(4, 3, 5, 5), *run.values())


def test_backend_forces_and_refuses():
    x = activation()
    with fusedres.backend("reference"):
        assert ops.forced_backend() == "reference"
        OPS.bn_stats(x, None, None, 1e-5)
    assert ops.forced_backend() == "auto"
    names = "auto, triton, cuda, cpu, reference"
    with (
        pytest.raises(ValueError, match=f"backend must be one of {names}, got 'gpu'"),
        fusedres.backend("gpu"),
    ):
        pass
    with (
        fusedres.backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' can't serve bn_stats on cpu"),
    ):
        OPS.bn_stats(x, None, None, 1e-5)
    # left as it was after the error
    assert ops.forced_backend() == "auto"


def conv(**facts):
    shape = {"batch": 8, "channels": 64, "height": 9, "width": 9, "filters": 64, "side": 3, "stride": 1}
    return plan.Conv(**shape | facts)


def problem(**facts):
    return plan.Problem(
        **{"op": "bn_act", "device": "cuda", "dtype": "bfloat16", "capability": (9, 0)} | facts
    )


@pytest.mark.parametrize(
    ("facts", "unavailable", "expected", "reason"),
    [
        ({}, {}, "cuda", "first choice on cuda"),
        ({}, {"cuda": "built without CUDA"}, "triton", "built without CUDA"),
        ({"op": "cast_weights"}, {"cuda": "gone"}, "aten", "triton has no kernel for cast_weights"),
        ({"built_for": ("80", "90a")}, {}, "cuda", "first choice on cuda"),
        ({"built_for": ("90a",), "capability": (8, 0)}, {}, "triton", "built for 90a, the GPU has .* 8.0"),
        ({"capability": (7, 5)}, {}, "aten", "compute capability 7.5, kernels need 8.0"),
        ({"dtype": "float64"}, {}, "aten", "no kernel for float64"),
        ({"device": "cpu", "capability": None}, {}, "cpu", "first choice on cpu"),
        ({"device": "cpu", "capability": None}, {"cpu": "not built"}, "aten", "not built"),
        ({"device": "mps", "capability": None}, {}, "aten", "no kernels for mps devices"),
        ({"op": "bias_relu_maxpool"}, {}, "cuda", "first choice on cuda"),
        ({"op": "conv_bias_act", "device": "cpu"}, {}, "aten", "cpu has no kernel for conv_bias_act"),
        ({"op": "conv_bias_act", "conv": conv()}, {}, "triton", "predicted .*; not measured"),
        ({"op": "conv_bias_act", "conv": conv(side=1)}, {}, "aten", "predicted .*; not measured"),
        ({"op": "conv_int8", "dtype": "int8", "conv": conv()}, {}, "triton", "predicted .*; not measured"),
        ({"op": "conv_int8", "conv": conv()}, {}, "aten", r"no kernel for bfloat16 \(there is int8\)"),
        (
            {"op": "conv_bias_act", "dtype": "int8"},
            {},
            "aten",
            r"no kernel for int8 \(there are float32, .* and",
        ),
        (
            {"op": "conv_int8", "dtype": "int8", "conv": conv(filters=72)},
            {},
            "aten",
            "multiples of 16, got 64",
        ),
        ({"op": "conv_fwd", "device": "cpu"}, {}, "aten", "cpu has no kernel for conv_fwd"),
        ({"op": "conv_fwd", "conv": conv(groups=4)}, {}, "aten", "no op for groups or dilation, got 4 and 1"),
        ({"op": "conv_fwd", "conv": conv(side=7)}, {}, "aten", "ops are 1x1 and 3x3 .*, got 7x7"),
        ({"op": "conv_dgrad", "conv": conv(pending=True)}, {}, "triton", "predicted .*; not measured"),
        ({"op": "conv_dgrad", "conv": conv(pending=True)}, {"triton": "gone"}, "cuda", "predicted"),
        ({"op": "conv_dgrad", "conv": conv(stride=2)}, {"triton": "gone"}, "aten", "of stride 1, got 2"),
        (
            {"op": "conv_dgrad", "dtype": "float32", "conv": conv(ieee=True)},
            {"triton": "gone"},
            "aten",
            "as TF32, which torch.backends.cudnn.allow_tf32 forbids",
        ),
        ({"op": "conv_fwd", "conv": conv(channels=12)}, {}, "aten", "multiples of 8, got 12 and 64"),
    ],
)
def test_plan(facts, unavailable, expected, reason):
    choice = plan.choose(problem(**facts), unavailable)
    assert choice.implementation == expected
    assert re.search(reason, choice.reason)


@pytest.mark.parametrize(
    ("facts", "expected", "reason"),
    [
        ({"stride": 1}, "cuda", "forced"),
        ({"stride": 2}, "aten", "the CUDA conv_dgrad is of stride 1, got 2"),
        ({"ieee": True}, "aten", "multiply float32 as TF32"),
    ],
)
def test_what_a_forced_backend_leaves_to_pytorch(facts, expected, reason):
    choice = plan.choose(problem(op="conv_dgrad", conv=conv(**facts)), {}, "cuda")
    assert choice.implementation == expected
    assert reason in choice.reason


def test_a_forced_backend_is_not_left_for_a_shape_that_no_kernel_takes():
    with pytest.raises(RuntimeError, match="multiples of 8, got 12 and 64"):
        plan.choose(problem(op="conv_dgrad", conv=conv(channels=12)), {}, "cuda")


@pytest.mark.parametrize(
    ("architecture", "runs_on"),
    [
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)]),
        ("86-real", [(8, 6), (8, 9)]),
        ("90a", [(9, 0)]),
        ("100f", [(10, 0)]),
        ("120", [(12, 0)]),
    ],
)
def test_what_an_architecture_covers(architecture, runs_on):
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    expected = [g for g in gpus if g in runs_on or (architecture == "80" and g >= (8, 0))]
    assert [g for g in gpus if plan.covers(architecture, g)] == expected
