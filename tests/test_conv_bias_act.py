"""The convolution of a trained net: the op, and the Triton kernel's numbers and compiled code."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F
from bn_case import LAYOUTS
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

import fusedres

triton = pytest.importorskip("triton")
from fusedres.kernels.triton.conv_bias_act import conv_bias_act, conv_bias_act_kernel  # noqa: E402
from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(x, weight, bias, residual, relu, stride):
    """The same by PyTorch, in float32 or float64."""
    z = F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[2] // 2)
    if residual is not None:
        z = z + residual
    return F.relu(z) if relu else z


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
class TestNumbers:
    def check(self, shape, filters, side, stride, dtype, *, bias=True, residual=True, relu=True):
        n, c, h, w = shape
        memory = torch.channels_last
        x = torch.randn(shape).to(dtype).to(memory_format=memory)
        weight = (torch.randn(filters, c, side, side) / (c * side * side) ** 0.5).to(dtype)
        weight = weight.to(memory_format=memory)
        out = (n, filters, (h - 1) // stride + 1, (w - 1) // stride + 1)
        b = torch.randn(filters) if bias else None
        r = torch.randn(out).to(dtype).to(memory_format=memory) if residual else None

        def run():
            z = torch.empty(out, dtype=dtype, memory_format=memory)
            conv_bias_act(x, weight, b, r, relu, stride, z)
            return z

        def reference(wide):
            tensors = (t if t is None else t.to(wide) for t in (x, weight, b, r))
            return plain(*tensors, relu, stride)

        z = run()
        # rounded once
        assert_close_to_reference(z, reference(torch.float32).to(dtype), reference(torch.float64), name="z")
        assert torch.equal(run(), z)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [1, 3])
    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
    def test_taps_strides_and_residual(self, residual, side, stride, dtype, poisoned):
        self.check((2, 72, 9, 7), 40, side, stride, dtype, residual=residual)

    @pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
    def test_bias_and_relu(self, bias, relu):
        self.check((2, 16, 5, 5), 16, 1, 1, torch.float16, bias=bias, residual=False, relu=relu)
        self.check((2, 16, 5, 5), 16, 1, 1, torch.float16, bias=bias, relu=relu)

    @pytest.mark.parametrize("filters", [8, 64, 136])
    @pytest.mark.parametrize("shape", [(1, 8, 1, 2), (2, 64, 8, 8), (1, 40, 3, 5)], ids=str)
    def test_tails(self, shape, filters, poisoned):
        self.check(shape, filters, 1, 1, torch.float32)

    def test_more_tiles_than_a_group(self):
        self.check((1, 8, 36, 32), 136, 1, 1, torch.float32)

    def test_rounded_once(self):
        """Sums of small integers are exact, so nothing but the order of additions decides on the bits."""
        x = torch.randint(-4, 5, (1, 8, 6, 6)).half().to(memory_format=torch.channels_last)
        weight = torch.randint(-2, 3, (16, 8, 1, 1)).half()
        bias = torch.randn(16)
        residual = torch.randn(1, 16, 6, 6).half().to(memory_format=torch.channels_last)
        z = torch.empty_like(residual)
        conv_bias_act(x, weight, bias, residual, True, 1, z)
        assert torch.equal(z, plain(x.float(), weight.float(), bias, residual.float(), True, 1).half())

    def test_nan_stays(self):
        x = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
        x[0, 3, 1, 2] = float("nan")
        z = torch.empty_like(x)
        conv_bias_act(x, torch.randn(8, 8, 1, 1), None, None, True, 1, z)
        assert torch.equal(z.isnan(), x.isnan().any(1, keepdim=True).expand_as(z))


@pytest.fixture
def backend():
    """The kernel where Triton's interpreter runs it, else plain PyTorch."""
    with fusedres.backend("triton" if INTERPRETED else "reference"):
        yield


@pytest.mark.usefixtures("backend", "poisoned")
class TestOp:
    def check(self, x, weight, bias, residual, relu, stride):
        def run(*tensors):
            return torch.ops.fusedres.conv_bias_act(*tensors, relu, stride)

        def wide(dtype):
            return (t if t is None else t.to(dtype) for t in (x, weight, bias, residual))

        z, reference = run(x, weight, bias, residual), plain(*wide(torch.float64), relu, stride)
        assert_close_to_reference(z, plain(*wide(torch.float32), relu, stride).to(x.dtype), reference)
        if not INTERPRETED:
            torch.testing.assert_close(run(*wide(torch.float64)), reference)
        return z

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("side", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
    def test_values(self, side, stride, dtype, layout):
        memory = LAYOUTS[layout]
        x = torch.randn(2, 24, 7, 6).to(dtype).to(memory_format=memory)
        # the weight in the other layout: an op takes both
        weight = (torch.randn(16, 24, side, side) / (24 * side**2) ** 0.5).to(dtype)
        if memory == torch.contiguous_format:
            weight = weight.to(memory_format=torch.channels_last)
        out = (2, 16, 7, 6) if stride == 1 else (2, 16, 4, 3)
        bias, residual = torch.randn(16), torch.randn(out).to(dtype).to(memory_format=memory)
        for b, r, relu in ((bias, residual, True), (None, residual, False), (bias, None, True)):
            self.check(x, weight, b, r, relu, stride)
        assert self.check(x, weight, None, None, False, stride).min() < 0

    def test_an_empty_batch(self):
        z = torch.ops.fusedres.conv_bias_act(
            torch.randn(0, 8, 5, 5), torch.randn(16, 8, 3, 3), None, None, True, 2
        )
        assert z.shape == (0, 16, 3, 3)


def compile_kernel(config, dtype, arch, variant):
    launch = dict(config.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    constants = launch | {"STRIDE": 1, "RELU": True, "EVEN": True, "PRECISION": "tf32"} | variant
    kinds = {"x": dtype, "weight": dtype, "bias": "fp32", "residual": dtype, "z": dtype}
    signature = {
        name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
        for name in conv_bias_act_kernel.arg_names
    }
    return compile_for(arch, conv_bias_act_kernel, signature, constants, options)


VARIANTS = [
    {"TAPS": 1},
    {"TAPS": 9},
    {"TAPS": 9, "residual": None},
    {"TAPS": 1, "residual": None},
    {"TAPS": 1, "STRIDE": 2, "residual": None, "RELU": False},
    {"TAPS": 9, "STRIDE": 2},
    {"TAPS": 9, "EVEN": False},
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("variant", VARIANTS[:3], ids=str)
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
        kernel, chip = "conv_bias_act", (arch // 10, arch % 10)
        valid = [c for c in CONFIGS[kernel] if is_valid(kernel, c, problem, chip)]
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
            if arch == 90:
                assert used["REG"] * config.programs_per_sm * config.num_warps * 32 <= 65536
