"""Launch settings of the convolution kernels: there is one for every problem on every GPU."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")
from fusedres.kernels.triton.conv_config import (  # noqa: E402
    CONFIGS,
    STAGED,
    ConvProblem,
    select,
    shared_bytes,
)

ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
SIZES = {
    "conv_fwd": (2, 4),
    "conv_fwd_residual": (2, 4),
    "conv_bias_act": (2, 4),
    "conv_int8": (1,),
    "conv_dgrad": (2,),
    "conv_dgrad_fp32": (4,),
    "conv_wgrad": (2, 4),
}


@pytest.mark.parametrize("arch", ARCHS, ids=str)
@pytest.mark.parametrize("kernel", SIZES)
def test_every_problem_has_a_setting(kernel, arch):
    few, many = (1, 8, 36, 64, 72, 128, 200), (1000, 12_544, 802_816)
    rows, inner = ((*few, 512), (*few, *many)) if kernel == "conv_wgrad" else ((*few, *many), (8, 64, 2048))
    for m, k, n, taps, size in itertools.product(
        rows, inner, (8, 16, 64, 72, 256, 2048), (1, 9), SIZES[kernel]
    ):
        problem = ConvProblem(m, k, n, taps, size)
        config = select(kernel, problem, arch)
        assert shared_bytes(kernel, config, problem) <= 1024 * SHARED_KIB[arch]


def test_every_kernel_has_its_facts():
    assert CONFIGS.keys() == STAGED.keys()
    assert all(len(set(configs)) == len(configs) for configs in CONFIGS.values())
