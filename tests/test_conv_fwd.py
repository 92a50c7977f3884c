"""The Triton convolution that consumes a batch norm: its numbers, and what the compiler makes of it."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

from fusedres.kernels.rows import MEAN, SCALE, SHIFT, VAR

triton = pytest.importorskip("triton")
from fusedres.kernels.triton import config as bn_config  # noqa: E402
from fusedres.kernels.triton.bn_act import bn_act  # noqa: E402
from fusedres.kernels.triton.bn_stats import bn_stats_finalize_kernel  # noqa: E402
from fusedres.kernels.triton.conv_common import check_sizes  # noqa: E402
from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid, shared_bytes  # noqa: E402
from fusedres.kernels.triton.conv_fwd import conv_fwd, conv_fwd_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def affine(x, stats):
    return x.to(stats.dtype) * stats[SCALE].view(1, -1, 1, 1) + stats[SHIFT].view(1, -1, 1, 1)


def activation(x, stats, residual, residual_stats, relu):
    """What is convolved, by PyTorch, in the dtype of x."""
    if stats is None:
        return x
    u = affine(x, stats)
    if residual is not None:
        u = u + (residual if residual_stats is None else affine(residual, residual_stats))
    return (F.relu(u) if relu else u).to(x.dtype)


def statistics(y, weight, bias):
    """mean, var, rstd, scale and shift of y's channels."""
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    rstd = (var + EPS).rsqrt()
    scale = weight * rstd
    return mean, var, rstd, scale, bias - mean * scale


def amid_nan(t, dtype):
    """In channels_last, with NaN before and behind: what is read outside shows."""
    around = torch.full((t.numel() + 2048,), float("nan"), dtype=dtype)
    n, c, h, w = t.shape
    inside = around[1024:-1024].view(n, h, w, c).permute(0, 3, 1, 2)
    return inside.copy_(t)


def wide(t):
    return None if t is None else t.double()


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
class TestNumbers:
    def check(
        self, shape, filters, side, stride, dtype, *, prologue=True, relu=True, residual=False, branch=False
    ):
        n, c, h, w = shape
        memory = torch.channels_last
        x = amid_nan(torch.randn(shape), dtype)
        weight = amid_nan(torch.randn(filters, c, side, side) / (c * side * side) ** 0.5, dtype)
        norm = torch.randn(2, filters)
        stats = torch.randn(5, c) if prologue else None
        r = amid_nan(torch.randn(shape), dtype) if residual else None
        r_stats = torch.randn(5, c) if branch else None
        out = (n, filters, (h - 1) // stride + 1, (w - 1) // stride + 1)

        def run():
            z = torch.empty(shape, dtype=dtype, memory_format=memory) if residual else None
            y = torch.empty(out, dtype=dtype, memory_format=memory)
            y_stats = torch.empty(5, filters)
            conv_fwd(x, stats, r, r_stats, relu, weight, stride, *norm, EPS, z, y, y_stats)
            return y, y_stats, z

        def plain(of, weight):
            return F.conv2d(of, weight, stride=stride, padding=side // 2)

        y, y_stats, z = run()
        theirs = activation(x, stats, r, r_stats, relu)
        exact = activation(x.double(), wide(stats), wide(r), wide(r_stats), relu)
        assert_close_to_reference(y, plain(theirs, weight), plain(exact, weight.double()), name="y")
        if residual:
            assert_close_to_reference(z, theirs, exact, name="z")
            of_bn_act = torch.empty(shape, dtype=dtype, memory_format=memory)
            bn_act(x, stats, r, r_stats, relu, of_bn_act)
            assert torch.equal(z, of_bn_act)
        # the statistics are those of the values that were stored
        for row, value in enumerate(statistics(y.double(), *norm)):
            torch.testing.assert_close(y_stats[row].double(), value, rtol=2e-5, atol=2e-5)
        y_again, y_stats_again, z_again = run()
        assert torch.equal(y_again, y) and torch.equal(y_stats_again, y_stats)
        assert z is None or torch.equal(z_again, z)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [1, 3])
    @pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
    def test_taps_strides_and_prologue(self, prologue, side, stride, dtype, poisoned):
        self.check((3, 72, 9, 7), 40, side, stride, dtype, prologue=prologue)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
    @pytest.mark.parametrize("branch", [False, True], ids=["identity", "projection"])
    def test_residual(self, branch, relu, dtype, poisoned):
        self.check((3, 72, 9, 7), 136, 1, 1, dtype, relu=relu, residual=True, branch=branch)

    @pytest.mark.parametrize("filters", [8, 64, 136])
    @pytest.mark.parametrize("shape", [(1, 8, 1, 2), (2, 64, 8, 8), (1, 136, 3, 5)], ids=str)
    def test_tails(self, shape, filters, poisoned):
        self.check(shape, filters, 1, 1, torch.float32, residual=True)

    @pytest.mark.parametrize("filters", [8, 136])
    @pytest.mark.parametrize("shape", [(1, 8, 1, 2), (2, 64, 8, 8), (1, 40, 3, 5)], ids=str)
    def test_tails_of_taps(self, shape, filters, poisoned):
        self.check(shape, filters, 3, 1, torch.float32)

    @pytest.mark.parametrize("shape", [(2, 8, 6, 1), (2, 8, 1, 6), (5, 8, 2, 3)], ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    def test_narrow_images(self, stride, shape, poisoned):
        self.check(shape, 8, 3, stride, torch.float32)

    def test_more_tiles_than_a_group(self):
        self.check((1, 8, 36, 32), 136, 1, 1, torch.float32, residual=True, branch=True)

    def test_no_relu(self):
        self.check((2, 16, 5, 5), 16, 3, 1, torch.float32, relu=False)

    def test_many_programs_are_merged(self, monkeypatch, poisoned):
        monkeypatch.setattr(bn_config, "FINALIZE", bn_config.FINALIZE_MANY)
        self.check((1, 8, 29, 33), 24, 1, 1, torch.float32)

    @pytest.mark.parametrize("side", [1, 3])
    def test_what_is_read_and_written(self, side, monkeypatch):
        """Nothing outside of the tensors is read; z is written by the programs of one column of tiles."""
        from triton.runtime.interpreter import interpreter_builder as builder

        c, filters, memory = 72, 136, torch.channels_last
        x, r = (torch.randn(2, c, 9, 9).to(memory_format=memory) for _ in range(2))
        weight = torch.randn(filters, c, side, side).to(memory_format=memory)
        stats = torch.randn(5, c)
        z, y = (torch.empty(2, n, 9, 9).to(memory_format=memory) for n in (c, filters))
        if side == 3:
            r = z = None
        seen = {}

        def watch(name, mask):
            access = getattr(builder, name)

            def watched(pointers, *args):
                active = pointers.data[args[mask].data.astype(bool)].astype("int64")
                seen.setdefault(name, []).append(torch.from_numpy(active).flatten())
                return access(pointers, *args)

            monkeypatch.setattr(builder, name, watched)

        def of(t, name):
            """Which elements of a tensor were accessed."""
            places = torch.cat(seen[name]) - t.data_ptr()
            return places[(places >= 0) & (places < t.nbytes)] // 4

        watch("create_masked_load", mask=0)
        watch("create_masked_store", mask=1)
        conv_fwd(x, stats, r, None, True, weight, 1, None, None, EPS, z, y, None)
        inside = sum(len(of(t, "create_masked_load")) for t in (x, r, weight, stats) if t is not None)
        assert inside == sum(map(len, seen["create_masked_load"]))
        for t in (y, z):
            assert t is None or torch.equal(of(t, "create_masked_store").sort()[0], torch.arange(t.numel()))

    @pytest.mark.parametrize("size", [(16, 16), (15, 17)], ids=["whole tiles", "a part"])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_mean_far_from_zero(self, stride, size):
        """|mean| / std of the output of about 1e3: sums of squares would keep nothing of the variance."""
        x = torch.ones(4, 8, *size) + 1e-3 * torch.randn(4, 8, *size)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.rand(8, 8, 1, 1).to(memory_format=torch.channels_last)
        y = torch.empty(4, 8, *((n - 1) // stride + 1 for n in size)).to(memory_format=torch.channels_last)
        stats = torch.empty(5, 8)
        conv_fwd(x, None, None, None, True, weight, stride, None, None, EPS, None, y, stats)
        mean, var = y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)
        assert (mean / var.sqrt()).min() > 500
        torch.testing.assert_close(stats[MEAN].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(stats[VAR].double(), var, rtol=1e-4, atol=0)

    def test_nan_stays(self):
        """In z, in all filters of its position and nowhere else."""
        x, r = (torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last) for _ in range(2))
        x[0, 3, 1, 2] = float("nan")
        z, y = torch.empty_like(x), torch.empty_like(x)
        weight = torch.randn(8, 8, 1, 1)
        conv_fwd(x, torch.randn(5, 8), r, None, True, weight, 1, None, None, EPS, z, y, None)
        assert torch.equal(z.isnan(), x.isnan())
        assert torch.equal(y.isnan(), x.isnan().any(1, keepdim=True).expand_as(y))


@pytest.mark.parametrize(
    "x, weight, out",
    [
        pytest.param((2**15, 8, 256, 256), (8, 8, 1, 1), (2**15, 8, 256, 256), id="positions"),
        pytest.param((2**13, 8, 512, 512), (8, 8, 1, 1), (2**13, 8, 256, 256), id="positions of x"),
        pytest.param((1, 2**16, 8, 8), (2**15, 2**16, 1, 1), (1, 2**15, 8, 8), id="elements of the weight"),
        pytest.param((1, 2**14, 1, 2**17), (8, 2**14, 1, 1), (1, 8, 1, 2**17), id="offsets in a tile"),
    ],
)
def test_too_large_for_int32(x, weight, out):
    with pytest.raises(ValueError, match="too large for int32"):
        check_sizes(torch.Size(x), torch.Size(weight), torch.Size(out))


def test_what_is_large_and_fits():
    check_sizes(*(torch.Size(s) for s in ((4096, 256, 256, 256), (2048, 2048, 3, 3), (4096, 256, 256, 256))))


def test_how_many_programs_are_many():
    merged = [bn_config.finalize(programs) for programs in (1, 512, 513, 6272)]
    assert merged == [bn_config.FINALIZE] * 2 + [bn_config.FINALIZE_MANY] * 2


def compile_kernel(config, dtype, arch, variant):
    launch = dict(config.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    constants = {"STRIDE": 1, "RELU": True, "EVEN": True, "FULL": True, "PRECISION": "tf32"}
    constants = launch | constants | variant
    kinds = dict.fromkeys(("x", "residual", "weight", "z", "y"), dtype)
    kinds |= dict.fromkeys(("stats", "residual_stats", "partial"), "fp32")
    signature = {
        name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
        for name in conv_fwd_kernel.arg_names
    }
    return compile_for(arch, conv_fwd_kernel, signature, constants, options)


ALONE = {"residual": None, "residual_stats": None, "z": None}
PLAIN = {"stats": None, **ALONE}
TRAINED = [{"TAPS": 1, **ALONE}, {"TAPS": 9, **ALONE}, {"TAPS": 9, "STRIDE": 2, **ALONE}, {"TAPS": 1}]
VARIANTS = [
    *TRAINED,
    {"TAPS": 1, "STRIDE": 2, **ALONE},
    {"TAPS": 1, **PLAIN},
    {"TAPS": 1, "STRIDE": 2, **PLAIN},
    {"TAPS": 9, **PLAIN},
    {"TAPS": 9, "EVEN": False, "FULL": False, **ALONE},
    {"TAPS": 9, "FULL": False, **ALONE},
    {"TAPS": 9, "partial": None, **ALONE},
    {"TAPS": 1, "FULL": False, **ALONE},
    {"TAPS": 1, "residual_stats": None},
    {"TAPS": 1, "FULL": False},
    {"TAPS": 1, "EVEN": False, "FULL": False},
]


def name_of(variant):
    return ",".join(f"{k}={v}" for k, v in variant.items() if k not in ALONE) + (
        "" if "residual" in variant else ",residual" if "residual_stats" in variant else ",projection"
    )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("variant", TRAINED, ids=name_of)
    def test_first_choice(self, arch, variant, tmp_path):
        self.check(arch, variant, "bf16", tmp_path, only_first=True)

    @pytest.mark.codegen
    @pytest.mark.parametrize("dtype", ITEMSIZES)
    @pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
    def test_everything_shipped(self, arch, variant, dtype, tmp_path):
        self.check(arch, variant, dtype, tmp_path, only_first=False)

    def check(self, arch, variant, dtype, tmp_path, *, only_first):
        itemsize = ITEMSIZES[dtype]
        kernel = "conv_fwd" if "residual" in variant else "conv_fwd_residual"
        problem = ConvProblem(100_000, 256, 256, variant["TAPS"], itemsize)
        valid = [c for c in CONFIGS[kernel] if is_valid(kernel, c, problem, (arch // 10, arch % 10))]
        assert valid
        for config in valid[:1] if only_first else valid:
            compiled = compile_kernel(config, dtype, arch, variant)
            assert compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{config} spills: {used}"
            ptx = compiled.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            tensors = 1 if "residual" in variant else 2
            operands = (tensors * config.block_m + config.block_n) * config.block_k * itemsize
            each = operands // (config.num_warps * 32 * 16)
            assert len(copies) >= config.num_stages * each, f"{len(copies)} copies of 16 bytes"
            if itemsize == 2 and arch in (90, 100):
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
            if arch == 90:
                # sums of filters are sums within threads, and as many programs fit as are meant to
                assert len(re.findall(r"shfl\.sync", ptx)) <= 32
                assert used["REG"] * config.programs_per_sm * config.num_warps * 32 <= 65536
                assert compiled.metadata.shared <= shared_bytes(kernel, config, problem)

    def test_many_programs_are_merged(self, arch, tmp_path):
        keywords = dict(bn_config.FINALIZE_MANY.keywords)
        options = {"num_warps": keywords.pop("num_warps")}
        constants = {"x": None} | keywords
        kinds = {"eps": "fp32"} | dict.fromkeys(("rows", "rows_per_program", "programs", "channels"), "i32")
        signature = {
            name: "constexpr" if name in constants else kinds.get(name, "*fp32")
            for name in bn_stats_finalize_kernel.arg_names
        }
        used = usage(compile_for(arch, bn_stats_finalize_kernel, signature, constants, options), tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, used
