"""The CUDA launchers as Python calls them: what they refuse, and a launch that fails says so."""

from __future__ import annotations

import pytest
import torch

from fusedres import kernels

if "cuda" in kernels.unavailable():
    pytest.skip(kernels.unavailable()["cuda"], allow_module_level=True)

from fusedres import _C

DEVICE = (4, 0)  # multiprocessors, the default stream
MATRIX, IMAGE = ("float32", 6, 8), ("bfloat16", 2, 7, 5, 16)
SOME = 256  # an address that is never used

CONV = ("bfloat16", 2, 9, 7, 16, 24, 3, 1)
STEM = ("bfloat16", 2, 9, 7, 16)
STRIDES = (189, 63, 7, 1)
IMAGES, FILTERS = ("uint8", SOME, STRIDES), ("float32", SOME, (147, 49, 7, 1))

# every launcher, its arguments, and what it has to call itself and its problem when it fails
LAUNCHES = {
    "cuda_bn_stats": ((*MATRIX, SOME, 0, 0, 1e-5, SOME, SOME), r"bn_stats of \[6, 8\]"),
    "cuda_bn_running_stats": ((8, SOME, SOME, 0, 0, 1e-5, SOME), r"bn_running_stats of \[1, 8\]"),
    "cuda_bn_update_running_": ((8, SOME, SOME, SOME, 6, 0.1), r"bn_update_running of \[1, 8\]"),
    "cuda_bn_act": ((*MATRIX, SOME, SOME, 0, 0, True, SOME), r"bn_act of \[6, 8\]"),
    "cuda_bn_act_backward_reduce": (
        (*MATRIX, SOME, SOME, 0, SOME, 0, 0, True, SOME, 0, SOME, 0),
        r"bn_act_backward_reduce of \[6, 8\]",
    ),
    "cuda_bn_act_backward_apply": (
        (*MATRIX, SOME, SOME, SOME, SOME, 0, 0, 0, True, SOME, 0),
        r"bn_act_backward_apply of \[6, 8\]",
    ),
    "cuda_bn_relu_maxpool": ((*IMAGE, SOME, SOME, SOME, SOME), r"bn_relu_maxpool of \[2, 16, 7, 5\]"),
    "cuda_bias_relu_maxpool": ((*IMAGE, SOME, 0, SOME), r"bias_relu_maxpool of \[2, 16, 7, 5\]"),
    "cuda_bn_relu_maxpool_backward_reduce": (
        (*IMAGE, SOME, SOME, SOME, SOME, SOME, SOME),
        r"bn_relu_maxpool_backward_reduce of \[2, 16, 7, 5\]",
    ),
    "cuda_bn_relu_maxpool_backward_apply": (
        (*IMAGE, SOME, SOME, SOME, SOME, SOME, SOME),
        r"bn_relu_maxpool_backward_apply of \[2, 16, 7, 5\]",
    ),
    "cuda_global_avg_pool": ((*IMAGE, SOME, SOME), r"global_avg_pool of \[2, 16, 7, 5\]"),
    "cuda_global_avg_pool_backward": ((*IMAGE, SOME, SOME), r"global_avg_pool_backward of \[2, 16, 7, 5\]"),
    "cuda_conv_dgrad": (
        (*IMAGE, 24, 3, SOME, SOME, SOME, SOME, SOME, SOME, 16, False) + (SOME, SOME, True, SOME, SOME, SOME),
        r"conv_dgrad of \[2, 16, 7, 5\] by 24 filters of 3x3",
    ),
    "cuda_cast_weights": (("bfloat16", [(SOME, SOME, 8, 3, 9)]), "cast_weights of 1 weights"),
    "cuda_conv_fwd": (
        (*CONV, SOME, SOME, True, SOME, 0, 0, 1e-5, SOME, SOME, SOME),
        r"conv_fwd of \[2, 16, 9, 7\] by 24 filters 3x3/1",
    ),
    "cuda_conv_bias_act": (
        (*CONV, SOME, SOME, 0, 0, True, SOME),
        r"conv_bias_act of \[2, 16, 9, 7\] by 24 filters 3x3/1",
    ),
    "cuda_bottleneck_infer": (
        ("float16", 2, 9, 7, 256, 64, *(SOME,) * 8),
        r"bottleneck_infer of \[2, 256, 9, 7\] by 64 filters 3x3/1",
    ),
    "cuda_stem_conv": (
        (*STEM, *IMAGES, *FILTERS, 0, 0, 1e-5, SOME, SOME, SOME, SOME),
        r"stem_conv of \[2, 3, 9, 7\] by 16 filters",
    ),
    "cuda_stem_bias_act": (
        (*STEM, *IMAGES, (0.0,) * 3, (1.0,) * 3, *FILTERS, 0, True, SOME),
        r"stem_bias_act of \[2, 3, 9, 7\] by 16 filters",
    ),
    "cuda_stem_wgrad": (
        (*STEM, SOME, SOME, SOME, *FILTERS),
        r"stem_wgrad of \[2, 3, 9, 7\] by 16 filters",
    ),
}


def test_every_launcher_is_here():
    functions = {n for n in dir(_C) if n.startswith("cuda_") and callable(getattr(_C, n))}
    assert {n for n in functions if not n.endswith("_workspace")} == set(LAUNCHES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where no launch succeeds")
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_error_names_the_kernel_and_its_problem(name):
    arguments, problem = LAUNCHES[name]
    with pytest.raises(RuntimeError, match=f"^{problem} was not launched: .*(driver|device)"):
        getattr(_C, name)(*arguments, *DEVICE)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cuda_bn_stats", {0: "int8"}, "dtype must be float32, bfloat16 or float16, got int8"),
        ("cuda_bn_stats", {1: 0}, "an activation must not be empty"),
        ("cuda_bn_stats", {3: 0}, "x must not be null"),
        ("cuda_bn_stats", {7: 0}, "workspace must not be null"),
        ("cuda_bn_act", {8: 0}, "z must not be null"),
        ("cuda_bn_act_backward_reduce", {5: SOME}, "z and du go together"),
        ("cuda_bn_act_backward_reduce", {7: SOME}, "residual and residual_stats go together"),
        (
            "cuda_bn_act_backward_reduce",
            {7: SOME, 8: SOME, 13: SOME},
            "z must be given where a residual went through the ReLU",
        ),
        ("cuda_bn_act_backward_apply", {7: SOME, 8: SOME}, "dresidual must not be null"),
        (
            "cuda_bn_act_backward_apply",
            {7: SOME, 8: SOME, 12: SOME},
            "with a residual the gradient is behind the ReLU already",
        ),
        ("cuda_bn_relu_maxpool", {2: 0}, "an image must not be empty"),
        ("cuda_bn_relu_maxpool", {1: 1 << 20, 2: 1 << 6, 3: 1 << 6}, r"2\^31 pixels or more"),
        (
            "cuda_bias_relu_maxpool",
            {1: 1 << 20, 2: 1 << 6, 3: 1 << 6},
            r"bias_relu_maxpool of .* 2\^31 pixels",
        ),
        ("cuda_bias_relu_maxpool", {7: 0}, "z must not be null"),
        ("cuda_conv_dgrad", {6: 5}, "the side must be 1 or 3"),
        ("cuda_conv_dgrad", {5: 12}, "12 filters of 3x3: channels, filters .* must be multiples of 8"),
        ("cuda_conv_dgrad", {13: 12}, "channels, filters and add's pitch must be multiples of 8"),
        ("cuda_conv_dgrad", {8: SOME + 8}, "tensors must begin at multiples of 16 bytes"),
        ("cuda_conv_dgrad", {2: 1 << 15, 3: 1 << 15}, "by 24 filters of 3x3 is too large for int32"),
        ("cuda_conv_dgrad", {4: 1 << 16, 5: 1 << 16}, "is too large for int32"),
        ("cuda_conv_dgrad", {8: 0}, "y_sums needs y and y_stats"),
        ("cuda_conv_dgrad", {16: 0}, "x and x_stats go together"),
        ("cuda_conv_dgrad", {18: 0}, "x_sums needs them and a workspace"),
        ("cuda_conv_fwd", {15: 0}, "workspace must not be null"),
        ("cuda_bottleneck_infer", {4: 192}, "channels must be a multiple of 128, got 192"),
        ("cuda_bottleneck_infer", {5: 32}, "16 bits and 64 or 128 inner channels, got 16 and 32"),
        ("cuda_bottleneck_infer", {0: "float32"}, "got 32 and 64"),
        ("cuda_bottleneck_infer", {8: 0}, "bias1 must not be null"),
        ("cuda_stem_conv", {1: 0}, "a convolution must not be empty"),
        ("cuda_stem_conv", {4: 12}, "filters must be a multiple of 8, got 12"),
        ("cuda_stem_conv", {5: "int8"}, "dtype must be float32, bfloat16 or float16, got int8"),
        ("cuda_stem_conv", {14: 0}, "workspace must not be null"),
        ("cuda_stem_conv", {15: SOME + 8}, "stem_conv: tensors must begin at a multiple of 16 bytes"),
        ("cuda_stem_conv", {1: 1 << 20, 2: 1 << 6, 3: 1 << 6}, r"stem_conv of .* 2\^31 pixels"),
        ("cuda_stem_conv", {7: (189, 1 << 30, 7, 1)}, "an image's values lie 2\\^31 or more apart"),
        ("cuda_stem_bias_act", {15: 0}, "z must not be null"),
        ("cuda_stem_wgrad", {8: "uint8"}, "dweight must not be uint8"),
        ("cuda_cast_weights", {0: "float32"}, "cast_weights casts to 16 bits"),
        ("cuda_cast_weights", {1: [(SOME, SOME, 0, 3, 9)]}, "a weight must not be empty"),
        ("cuda_cast_weights", {1: [(0, SOME, 8, 3, 9)]}, "weight must not be null"),
    ],
)
def test_refuses_what_it_would_misread(name, change, message):
    arguments = [change.get(i, value) for i, value in enumerate(LAUNCHES[name][0])]
    with pytest.raises(ValueError, match=message):
        getattr(_C, name)(*arguments, *DEVICE)


def test_a_device_without_multiprocessors():
    with pytest.raises(ValueError, match="a device has at least 1 multiprocessor"):
        _C.cuda_bn_stats(*LAUNCHES["cuda_bn_stats"][0], 0, 0)


def test_workspace_holds_every_block_of_rows():
    """It grows with the device, not with the rows, and never falls below one block's sums."""
    sizes = [_C.cuda_bn_workspace("bfloat16", rows, 64, 2, 132) for rows in (1, 10_000, 10**6, 10**9)]
    assert sizes[0] == 2 * 64 and sizes == sorted(sizes) and sizes[2] == sizes[3]
    assert sizes[3] <= 132 * 3 * 2 * 64
    # a wide activation is summed by fewer blocks of rows, so that partial sums stay small beside it
    assert _C.cuda_bn_workspace("bfloat16", 12_544, 2048, 2, 132) * 4 < 0.05 * 12_544 * 2048 * 2
