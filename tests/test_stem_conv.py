"""The Triton kernels of the stem: their numbers, and what the compiler makes of them."""

from __future__ import annotations

import importlib
import os
import re

import pytest
import torch
import torch.nn.functional as F
from stem_case import DTYPES, EPS, LAST, SIZES, check, convolve, outputs
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

from fusedres.kernels.rows import VAR, pixels_shape

triton = pytest.importorskip("triton")
from fusedres.kernels.triton import config  # noqa: E402
from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid  # noqa: E402

# each is a function of the package, too
stem_conv, stem_wgrad = (
    importlib.import_module(f"fusedres.kernels.triton.{name}") for name in ("stem_conv", "stem_wgrad")
)

KERNELS = importlib.import_module("fusedres.kernels.triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["from registers", "from shared memory"])
def device(request, monkeypatch):
    """Launch settings of both kinds of tensor cores; sets the number of multiprocessors."""

    def use(multiprocessors):
        monkeypatch.setattr(config, "_facts", lambda device: (request.param, multiprocessors))

    use(2)
    return use


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
class TestNumbers:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype, device, poisoned):
        check(KERNELS, torch.randn(3, 3, 19, 22), 24, dtype, twice=dtype == torch.bfloat16)

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_borders(self, size, device, poisoned):
        check(KERNELS, torch.randn(2, 3, *size), 8, torch.float16)

    def test_a_tail_of_filters(self, device, poisoned):
        check(KERNELS, torch.randn(1, 3, 9, 12), 72, torch.float16)

    @pytest.mark.parametrize("device", [(9, 0)], indirect=True)
    def test_more_programs_than_a_group(self, device, poisoned):
        device(12)
        check(KERNELS, torch.randn(1, 3, 50, 54), 72, torch.float16)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "channels_last"])
    def test_layouts(self, layout, device, poisoned):
        x = torch.randn(2, 3, 11, 14).to(torch.bfloat16).to(memory_format=layout)
        check(KERNELS, x, 16, torch.bfloat16, layout=layout, weight_dtype=torch.float32)

    def test_any_strides(self, device, poisoned):
        check(KERNELS, torch.randn(14, 4, 2, 22).permute(2, 1, 0, 3)[:, 1:, :, ::2], 16, torch.float16)

    def test_pixels(self, poisoned):
        x = torch.randn(2, 3, 10, 133)
        pixels = torch.empty(pixels_shape(2, 10, 133), dtype=torch.float16)
        stem_conv.pack(x, pixels, stem_conv.PADDING, stem_conv.PADDING + 1)
        assert torch.equal(pixels, F.pad(x, (4, 3, 3, 2, 0, 1)).permute(0, 2, 3, 1).half())

    @pytest.mark.parametrize("device", [(8, 0)], indirect=True)
    def test_no_statistics_and_a_weight_to_cast(self, device, poisoned):
        x, weight = torch.randn(1, 3, 9, 10), torch.randn(8, 3, 7, 7) / 147**0.5
        pixels, y, _ = outputs(x, 8, torch.bfloat16)
        stem_conv.stem_conv(x, weight, None, None, EPS, pixels, y, None)
        x, weight = x.bfloat16(), weight.bfloat16()
        assert_close_to_reference(y, convolve(x, weight), convolve(x.double(), weight.double()))

    @pytest.mark.parametrize("device", [(8, 0)], indirect=True)
    def test_a_mean_far_from_zero(self, device):
        """|mean| / std of the output of about 1e3: sums of squares would keep nothing of the variance."""
        x = torch.ones(2, 3, 31, 30) + 1e-3 * torch.randn(2, 3, 31, 30)
        weight = torch.zeros(8, 3, 7, 7)
        weight[:, :, 3, 3] = torch.rand(8, 3)  # the middle never meets the border
        pixels, y, stats = outputs(x, 8, torch.float32)
        stem_conv.stem_conv(x, weight, None, None, EPS, pixels, y, stats)
        var = y.double().var((0, 2, 3), correction=0)
        assert (y.double().mean((0, 2, 3)) / var.sqrt()).min() > 500
        torch.testing.assert_close(stats[VAR].double(), var, rtol=1e-4, atol=0)


FLOATS = {"partial"}
NUMBERS = {"rows", "out_height", "out_width", "filter_groups", "steps", "programs"}
COMPILED = {"stem_conv": stem_conv.stem_conv_kernel, "stem_wgrad": stem_wgrad.stem_wgrad_partial_kernel}


def compile_kernel(name, setting, dtype, arch, variant):
    kernel = COMPILED[name]
    launch = dict(setting.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    constants = launch | {"PRECISION": "tf32"} | variant

    def kind(argument):
        if argument in constants:
            return "constexpr"
        return "i32" if argument in NUMBERS else "*fp32" if argument in FLOATS else f"*{dtype}"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return compile_for(arch, kernel, signature, constants, options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("name", COMPILED)
    def test_first_choice(self, name, arch, tmp_path):
        self.check(name, arch, "bf16", tmp_path, {}, only_first=True)

    @pytest.mark.codegen
    @pytest.mark.parametrize("dtype", ITEMSIZES)
    @pytest.mark.parametrize("name", COMPILED)
    def test_everything_shipped(self, name, arch, dtype, tmp_path):
        self.check(name, arch, dtype, tmp_path, {}, only_first=False)

    @pytest.mark.codegen
    @pytest.mark.parametrize("dtype", ITEMSIZES)
    def test_no_statistics(self, arch, dtype, tmp_path):
        self.check("stem_conv", arch, dtype, tmp_path, {"partial": None}, only_first=False)

    def check(self, name, arch, dtype, tmp_path, variant, *, only_first):
        itemsize, capability = ITEMSIZES[dtype], (arch // 10, arch % 10)
        table = stem_conv.table(name, itemsize, capability)
        valid = {}  # for many filters, and for few
        for filters in (64, 8):
            problem = {
                "stem_conv": ConvProblem(100_000, 32, filters, 7, itemsize),
                "stem_wgrad": ConvProblem(filters, 100_000, 224, 1, itemsize),
            }[name]
            valid |= dict.fromkeys(c for c in CONFIGS[table] if is_valid(table, c, problem, capability))
        assert valid
        for setting in list(valid)[:1] if only_first else valid:
            compiled = compile_kernel(name, setting, dtype, arch, variant)
            assert compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{setting} spills: {used}"
            ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            # the window of every position, all seven rows of it
            windows = (setting.block_m if name == "stem_conv" else setting.block_k) * 224
            each = windows * itemsize // (setting.num_warps * 32 * 16)
            assert len(copies) >= setting.num_stages * each, f"{len(copies)} copies of 16 bytes"
            if itemsize == 2:
                assert len(copies) == ptx.count("cp.async.c") - ptx.count("cp.async.commit"), "narrow copies"
            if itemsize == 2 and arch in (90, 100):
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
                # two programs of a multiprocessor fit
                assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024
            if name == "stem_conv":
                loop = ttgir[ttgir.index("scf.for") :]
                loop = loop[: loop.index("scf.yield", loop.rindex("async_copy_global_to_local"))]
                assert "tt.load" not in loop, "the weight is loaded again for every tile"
                assert loop.rindex("async_copy") < loop.index("tt.store"), "stores before the next loads"
