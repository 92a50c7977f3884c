"""The Triton convolution that consumes a batch norm: its numbers, and what the compiler makes of it."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

from fusedres.kernels.rows import SCALE, SHIFT, VAR

triton = pytest.importorskip("triton")
from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid  # noqa: E402
from fusedres.kernels.triton.conv_fwd import conv_fwd, conv_fwd_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5


def plain(x, stats, relu, weight, stride):
    """The same by PyTorch, in the dtype of x."""
    if stats is not None:
        u = x.to(stats.dtype) * stats[SCALE].view(1, -1, 1, 1) + stats[SHIFT].view(1, -1, 1, 1)
        x = (F.relu(u) if relu else u).to(x.dtype)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)


def statistics(y, weight, bias):
    """mean, var, rstd, scale and shift of y's channels."""
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    rstd = (var + EPS).rsqrt()
    scale = weight * rstd
    return mean, var, rstd, scale, bias - mean * scale


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
class TestNumbers:
    def check(self, shape, filters, side, stride, dtype, *, prologue=True, relu=True):
        n, c, h, w = shape
        memory = torch.channels_last
        x = torch.randn(shape).to(dtype).to(memory_format=memory)
        weight = (torch.randn(filters, c, side, side) / (c * side * side) ** 0.5).to(dtype)
        weight = weight.to(memory_format=memory)
        norm_weight, norm_bias = torch.randn(2, filters)
        stats = torch.randn(5, c) if prologue else None
        out = (n, filters, (h - 1) // stride + 1, (w - 1) // stride + 1)
        y = torch.empty(out, dtype=dtype, memory_format=memory)
        y_stats = torch.empty(5, filters)
        conv_fwd(x, stats, relu, weight, stride, norm_weight, norm_bias, EPS, y, y_stats)
        norm = (norm_weight, norm_bias)
        theirs = plain(x, stats, relu, weight, stride)
        wide = None if stats is None else stats.double()
        reference = plain(x.double(), wide, relu, weight.double(), stride)
        assert_close_to_reference(y, theirs, reference, name="y")
        # the statistics are those of the values that were stored
        for row, value in enumerate(statistics(y.double(), *norm)):
            torch.testing.assert_close(y_stats[row].double(), value, rtol=2e-5, atol=2e-5)
        again, again_stats = torch.empty_like(y), torch.empty_like(y_stats)
        conv_fwd(x, stats, relu, weight, stride, *norm, EPS, again, again_stats)
        assert torch.equal(again, y) and torch.equal(again_stats, y_stats)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [1, 3])
    @pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
    def test_taps_strides_and_prologue(self, prologue, side, stride, dtype, poisoned):
        self.check((3, 72, 9, 7), 40, side, stride, dtype, prologue=prologue)

    @pytest.mark.parametrize("filters", [8, 64, 136])
    @pytest.mark.parametrize("shape", [(1, 8, 1, 2), (2, 64, 8, 8), (1, 136, 3, 5)], ids=str)
    def test_tails(self, shape, filters, poisoned):
        self.check(shape, filters, 3, 1, torch.float32)

    def test_more_tiles_than_a_group(self):
        self.check((1, 8, 36, 32), 136, 1, 1, torch.float32)

    def test_no_relu(self):
        self.check((2, 16, 5, 5), 16, 3, 1, torch.float32, relu=False)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_mean_far_from_zero(self, stride):
        """|mean| / std of the output of about 1e3: sums of squares would keep nothing of the variance."""
        x = torch.ones(4, 8, 16, 16) + 1e-3 * torch.randn(4, 8, 16, 16)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.rand(8, 8, 1, 1).to(memory_format=torch.channels_last)
        y = torch.empty(4, 8, 16 // stride, 16 // stride).to(memory_format=torch.channels_last)
        stats = torch.empty(5, 8)
        conv_fwd(x, None, True, weight, stride, None, None, EPS, y, stats)
        var = y.double().var((0, 2, 3), correction=0)
        assert (y.double().mean((0, 2, 3)) / var.sqrt()).min() > 500
        torch.testing.assert_close(stats[VAR].double(), var, rtol=1e-4, atol=0)


def compile_kernel(config, dtype, arch, variant):
    launch = dict(config.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    constants = launch | {"STRIDE": 1, "RELU": True, "EVEN": True, "PRECISION": "tf32"} | variant
    kinds = {"x": dtype, "weight": dtype, "y": dtype, "stats": "fp32", "partial": "fp32"}
    signature = {
        name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
        for name in conv_fwd_kernel.arg_names
    }
    return compile_for(arch, conv_fwd_kernel, signature, constants, options)


TRAINED = [{"TAPS": 1}, {"TAPS": 9}, {"TAPS": 9, "STRIDE": 2}]
VARIANTS = [
    *TRAINED,
    {"TAPS": 1, "STRIDE": 2},
    {"TAPS": 1, "stats": None},
    {"TAPS": 1, "STRIDE": 2, "stats": None},
    {"TAPS": 9, "stats": None},
    {"TAPS": 9, "EVEN": False},
    {"TAPS": 9, "partial": None},
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("variant", TRAINED, ids=str)
    def test_first_choice(self, arch, variant, tmp_path):
        self.check(arch, variant, "bf16", tmp_path, only_first=True)

    @pytest.mark.codegen
    @pytest.mark.parametrize("dtype", ITEMSIZES)
    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_everything_shipped(self, arch, variant, dtype, tmp_path):
        self.check(arch, variant, dtype, tmp_path, only_first=False)

    def check(self, arch, variant, dtype, tmp_path, *, only_first):
        itemsize = ITEMSIZES[dtype]
        problem = ConvProblem(100_000, 256, 256, variant["TAPS"], itemsize)
        valid = [c for c in CONFIGS["conv_fwd"] if is_valid("conv_fwd", c, problem, (arch // 10, arch % 10))]
        assert valid
        for config in valid[:1] if only_first else valid:
            compiled = compile_kernel(config, dtype, arch, variant)
            assert compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{config} spills: {used}"
            ptx = compiled.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            operands = (config.block_m + config.block_n) * config.block_k * itemsize
            each = operands // (config.num_warps * 32 * 16)
            assert len(copies) >= config.num_stages * each, f"{len(copies)} copies of 16 bytes"
            if itemsize == 2 and arch in (90, 100):
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
