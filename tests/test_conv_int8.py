"""The 8-bit convolution of a trained net: exact, on Triton's interpreter and by plain PyTorch; its code."""

from __future__ import annotations

import os
import re

import pytest
import torch
from bn_case import LAYOUTS
from triton_code import SHARED_KIB, compile_for, usage

import fusedres

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CONV_INT8 = torch.ops.fusedres.conv_int8
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def backend():
    """The kernel where Triton's interpreter runs it, else plain PyTorch."""
    with fusedres.backend("triton" if INTERPRETED else "reference"):
        yield


def levels(*shape, low=-128):
    return torch.randint(low, 128, shape, dtype=torch.int8)


def sums(x, border, weight, stride):
    """sum((x - border) * weight), window by window, in int64."""
    filters, channels, side, _ = weight.shape
    n, _, h, w = x.shape
    around = side // 2
    centred = x.long() - border.long()[:, None, None]
    padded = torch.zeros(n, channels, h + 2 * around, w + 2 * around, dtype=torch.long)
    padded[:, :, around : around + h, around : around + w] = centred
    windows = padded.unfold(2, side, stride).unfold(3, side, stride)
    return torch.einsum("ncpqrs,kcrs->nkpq", windows, weight.long())


class Case:
    """A convolution of levels whose zero is ``zero``, scaled to results of some hundred."""

    def __init__(self, shape, filters, side, stride, *, zero=-128, residual=True, layout="channels_last"):
        memory = LAYOUTS[layout]
        channels = shape[1]
        self.x = levels(*shape).to(memory_format=memory)
        # the weight in the other layout: an op takes both
        weight = levels(filters, channels, side, side, low=-127)
        self.weight = weight.contiguous() if layout == "channels_last" else weight.to(memory_format=memory)
        self.border = torch.full((channels,), zero, dtype=torch.int8)
        self.stride = stride
        self.finish()
        largest = self.sums.abs().amax((0, 2, 3)).float().clamp(min=1)
        self.scale = torch.rand(filters) * 100 / largest
        self.bias = torch.randn(filters) * 20
        self.residual = levels(*self.sums.shape).to(memory_format=memory) if residual else None
        self.step = 0.3

    def finish(self):
        """What follows from the levels."""
        self.offset = -(self.border.long() * self.weight.long().sum((2, 3))).sum(1).int()
        self.sums = sums(self.x, self.border, self.weight, self.stride)

    def run(self, floor=-INFINITY, dtype=torch.int8):
        return CONV_INT8(
            *(self.x, self.border, self.weight, self.offset, self.scale, self.bias),
            *(self.residual, self.step, floor, self.stride, dtype),
        )

    def exact(self, floor=-INFINITY):
        """Before rounding, in float64."""
        u = self.sums.double() * self.scale.double()[:, None, None] + self.bias.double()[:, None, None]
        if self.residual is not None:
            u += self.residual.double() * self.step
        return u.clamp(min=floor)

    def check(self, floors=(-INFINITY, -11.0)):
        for floor in floors:
            exact, z = self.exact(floor), self.run(floor)
            assert z.dtype == torch.int8 and z.shape == exact.shape
            # nothing but float32 arithmetic on an exact sum stands between them: a thousandth of a level
            rounded = torch.round(exact).clamp(-128, 127)
            unsure = (exact - exact.floor() - 0.5).abs() < 1e-3
            assert torch.equal(z.double()[~unsure], rounded[~unsure])
            assert (z.double() - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-3

    def check_floating_point(self, dtype, floor):
        exact, z = self.exact(floor), self.run(floor, dtype)
        assert z.dtype == dtype
        # Triton's interpreter cuts the bits off that bf16 hasn't got
        cut = INTERPRETED and dtype == torch.bfloat16
        rounding = torch.finfo(dtype).eps * (1 if cut else 0.5)
        assert ((z.double() - exact).abs() <= rounding * exact.abs() + 1e-3).all()


@pytest.mark.parametrize("zero", [-128, 0, 5, 127])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("side", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_exact(side, stride, residual, zero, poisoned):
    Case((2, 80, 7, 6), 48, side, stride, zero=zero, residual=residual).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("floor", [-INFINITY, 0.0], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_floating_point_comes_out(residual, floor, dtype, poisoned):
    case = Case((2, 32, 5, 4), 16, 3, 1, residual=residual)
    case.check_floating_point(dtype, floor)
    assert torch.equal(case.run(), case.run())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = Case((2, 32, 5, 8), 16, 3, 1, layout=layout)
    case.check()
    channels_last = INTERPRETED or layout == "channels_last"
    assert case.run().is_contiguous(memory_format=LAYOUTS["channels_last" if channels_last else layout])


@pytest.mark.parametrize("filters", [16, 64, 144])
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (1, 16, 1, 3), (1, 48, 13, 11), (1, 144, 3, 1)], ids=str)
def test_tails_and_narrow_images(shape, filters, poisoned):
    """Images of one row or column are at two borders at once."""
    Case(shape, filters, 3, 1).check([-11.0])


def test_more_tiles_than_a_group():
    Case((1, 16, 36, 32), 144, 1, 1).check()


@pytest.mark.parametrize("zero", [-128, 127])
def test_the_largest_sums(zero):
    """Every product as far from 0 as it can be: over 2^24, where float32 has no longer every integer."""
    case = Case((1, 512, 4, 4), 16, 3, 1, zero=zero, residual=False)
    case.x.fill_(127 if zero < 0 else -128)
    case.weight[:8], case.weight[8:] = -128, 127
    case.finish()
    assert case.sums.abs().max() == 9 * 512 * 255 * 128
    case.scale.fill_(100 / case.sums.abs().max())
    case.check([-INFINITY])


def test_every_integer():
    """Odd sums over 2^24, unscaled, bit for bit: float32 wouldn't hold them on the way."""
    case = Case((1, 512, 4, 3), 16, 3, 1, zero=17, residual=False)
    case.x, case.weight = levels(*case.x.shape, low=100), levels(*case.weight.shape, low=100)
    case.finish()
    case.scale.fill_(1)
    case.bias.zero_()
    assert case.sums.max() > 2**25
    assert torch.equal(case.run(dtype=torch.float32), case.sums.float())


def test_a_border_for_each_channel():
    case = Case((2, 32, 5, 4), 16, 3, 1)
    case.border = levels(32)
    case.finish()
    case.check()


def test_rounds_to_even_and_saturates():
    """Ties, and what lies outside of 8 bits, by the residual and the bias alone."""
    halves = torch.tensor([-300.5, -128.5, -127.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e6, -1e30])
    bias = torch.zeros(16)
    bias[: len(halves)] = halves
    bias[13:] = torch.tensor([126.49999, -127.99999, 3e38])
    ones = torch.zeros(1, 16, 2, 2, dtype=torch.int8)
    given = (ones, ones[0, :, 0, 0].contiguous(), ones[..., :1, :1].expand(16, -1, -1, -1))
    nothing = (torch.zeros(16, dtype=torch.int32), torch.ones(16), bias, None, 0.0)
    z = CONV_INT8(*given, *nothing, -INFINITY, 1, torch.int8)
    expected = [-128, -128, -128, -2, -2, 0, 0, 2, 2, 126, 127, 127, -128, 126, -128, 127]
    assert z[0, :, 0, 0].tolist() == expected and (z == z[:, :, :1, :1]).all()
    z = CONV_INT8(*given, *nothing, -128 + 3, 1, torch.int8)
    assert z[0, :, 0, 0].tolist() == [max(level, -125) for level in expected]


def test_an_empty_batch():
    case = Case((1, 16, 5, 5), 32, 3, 2, residual=False)
    case.x = case.x[:0]
    assert case.run().shape == (0, 32, 3, 3)


def test_refusals():
    case = Case((2, 16, 5, 5), 32, 3, 1)
    given = (case.x, case.border, case.weight, case.offset, case.scale, case.bias, case.residual, 0.3, 0.0)

    def call(**others):
        names = ("x", "border", "weight", "offset", "scale", "bias", "residual", "step", "floor")
        return CONV_INT8(
            *(dict(zip(names, given, strict=True)) | others).values(),
            1,
            torch.int8,
        )

    for name, wrong, message in (
        ("x", case.x.float(), "x must be torch.int8, got torch.float32"),
        ("x", case.x.view(torch.uint8), "x must be torch.int8, got torch.uint8"),
        ("weight", case.weight.float(), "weight must be torch.int8, got torch.float32"),
        ("border", case.border.int(), "border must be torch.int8, got torch.int32"),
        ("offset", case.offset.long(), "offset must be torch.int32, got torch.int64"),
        ("scale", case.scale.double(), "scale must be torch.float32, got torch.float64"),
        ("residual", case.residual.float(), "residual must be torch.int8, got torch.float32"),
    ):
        with pytest.raises(TypeError, match=message):
            call(**{name: wrong})
    for name, wrong, message in (
        ("x", case.x[0], r"x must be \[N, C, H, W\], got \[16, 5, 5\]"),
        ("weight", levels(4, 16, 5, 5), r"weight must be \[K, 16, 1, 1\] or \[K, 16, 3, 3\], got"),
        ("border", case.border[:8], r"border must be contiguous, \[16\] on cpu, got \[8\]"),
        ("bias", torch.zeros(64)[::2], r"bias must be contiguous, \[32\] .* with strides \(2,\)"),
        ("residual", case.residual[:1], r"residual must be \[2, 32, 5, 5\] on cpu, got \[1, 32, 5, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{name: wrong})
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        CONV_INT8(*given, 3, torch.int8)
    with pytest.raises(TypeError, match="dtype must be one of torch.int8, .*, got torch.uint8"):
        CONV_INT8(*given, 1, torch.uint8)
    wide = torch.zeros(1, 65_808, 1, 1, dtype=torch.int8)
    vectors = (v[:1] for v in given[3:6])
    with pytest.raises(ValueError, match="weight must have at most 65,793 values a filter, got 65,808"):
        CONV_INT8(wide, wide[0, :, 0, 0].clone(), wide, *vectors, None, 0.0, 0.0, 1, torch.int8)


@pytest.mark.skipif(not INTERPRETED, reason="for the kernel's own limits: TRITON_INTERPRET=1")
def test_channels_that_no_kernel_takes():
    case = Case((1, 16, 5, 5), 24, 3, 1, residual=False)
    with pytest.raises(RuntimeError, match="must be multiples of 16, got 16 and 24"):
        case.run()


@pytest.mark.skipif(not INTERPRETED, reason="the kernel's own loads and stores: TRITON_INTERPRET=1")
@pytest.mark.parametrize(("side", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_traffic(side, stride):
    """A byte for each value: the input and the residual once, the output once."""
    pytest.importorskip("triton")
    from traffic import Traffic

    case = Case((2, 32, 6, 6), 16, side, stride)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)  # or the op would
    with Traffic({case.weight.data_ptr()}) as traffic:
        z = case.run()
    seen = case.x.numel() // (4 if (side, stride) == (1, 2) else 1)
    assert traffic.loaded == {"conv_int8": seen + z.numel()}
    assert traffic.stored == {"conv_int8": z.numel()}


def compile_kernel(config, arch, variant):
    from fusedres.kernels.triton.conv_int8 import conv_int8_kernel

    variant = dict(variant)
    launch = dict(config.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    kinds = {"x": "*i8", "border": "*i8", "weight": "*i8", "residual": "*i8", "offset": "*i32"}
    kinds |= {"scale": "*fp32", "bias": "*fp32", "residual_step": "fp32", "floor": "fp32"}
    kinds["z"] = f"*{variant.pop('z', 'i8')}"
    constants = launch | {"STRIDE": 1, "EVEN": True, "PRECISION": "tf32"} | variant
    if variant["TAPS"] == 1:
        constants["border"] = None
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "i32")
        for name in conv_int8_kernel.arg_names
    }
    return compile_for(arch, conv_int8_kernel, signature, constants, options)


VARIANTS = [
    {"TAPS": 1},
    {"TAPS": 9, "residual": None},
    {"TAPS": 9},
    {"TAPS": 1, "residual": None},
    {"TAPS": 1, "z": "bf16"},
    {"TAPS": 9, "z": "fp32"},
    {"TAPS": 1, "STRIDE": 2, "residual": None},
    {"TAPS": 9, "STRIDE": 2, "residual": None},
    {"TAPS": 9, "EVEN": False, "residual": None},
]


def product(arch):
    """The tensor cores' instruction."""
    import triton

    if arch == 90:
        return r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
    # older versions of Triton have it for floating point alone
    if arch == 100 and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        return r"tcgen05\.mma\.cta_group::1\.kind::i8"
    return r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
    def test_first_choice(self, arch, variant, tmp_path):
        self.check(arch, variant, tmp_path, only_first=True)

    @pytest.mark.codegen
    @pytest.mark.parametrize("variant", VARIANTS, ids=str)
    def test_everything_shipped(self, arch, variant, tmp_path):
        self.check(arch, variant, tmp_path, only_first=False)

    def check(self, arch, variant, tmp_path, *, only_first):
        pytest.importorskip("triton")
        from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid

        kernel, chip = "conv_int8", (arch // 10, arch % 10)
        problem = ConvProblem(100_000, 256, 256, variant["TAPS"], 1)
        valid = [c for c in CONFIGS[kernel] if is_valid(kernel, c, problem, chip)]
        assert valid
        for config in valid[:1] if only_first else valid:
            compiled = compile_kernel(config, arch, variant)
            assert compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{config} spills: {used}"
            ptx = compiled.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            each = (config.block_m + config.block_n) * config.block_k // (config.num_warps * 32 * 16)
            assert len(copies) >= config.num_stages * each, f"{len(copies)} copies of 16 bytes"
            assert re.search(product(arch), ptx), "no product of 8 bits"
            stores = set(re.findall(r"st\.global[.\w]*", ptx))
            assert stores == {"st.global.v4.b32"}, f"stores of other than 16 bytes: {stores}"
            if arch == 90:
                assert used["REG"] * config.programs_per_sm * config.num_warps * 32 <= 65536
