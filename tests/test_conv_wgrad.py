"""The Triton gradient of a convolution's weight: its numbers, and what the compiler makes of it."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

from fusedres.kernels.rows import MEAN, OFFSET, SCALE, SHIFT, SLOPE

triton = pytest.importorskip("triton")
from fusedres.kernels.triton import config  # noqa: E402
from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid, select  # noqa: E402
from fusedres.kernels.triton.conv_wgrad import (  # noqa: E402
    FINALIZED,
    conv_wgrad,
    conv_wgrad_finalize_kernel,
    conv_wgrad_partial_kernel,
    direct,
    divide,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def rows_of(matrix, *rows):
    return (matrix[row].view(1, -1, 1, 1) for row in rows)


def activation(x, stats, relu):
    if stats is None:
        return x
    scale, shift = rows_of(stats, SCALE, SHIFT)
    u = x.to(stats.dtype) * scale + shift
    return (F.relu(u) if relu else u).to(x.dtype)


def output_gradient(du, y, stats, sums):
    if stats is None:
        return du
    scale, mean = rows_of(stats, SCALE, MEAN)
    dy = scale * du.to(stats.dtype)
    if sums is not None:
        slope, offset = rows_of(sums, SLOPE, OFFSET)
        dy += slope * (y.to(stats.dtype) - mean) + offset
    return dy.to(du.dtype)


def plain(du, y, y_stats, y_sums, x, x_stats, relu, stride, shape, dtype):
    """The same by PyTorch: the prologues' results in the dtype of x, the convolution in ``dtype``."""
    a, dy = activation(x, x_stats, relu), output_gradient(du, y, y_stats, y_sums)
    return torch.nn.grad.conv2d_weight(a.to(dtype), shape, dy.to(dtype), stride, shape[2] // 2)


def doubled(*values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def close_to_plain(dweight, stride, du, y, y_stats, y_sums, x, x_stats, relu):
    """Run the kernels into ``dweight`` and hold them to PyTorch's error."""
    inputs = (du, y, y_stats, y_sums, x, x_stats, relu)
    conv_wgrad(*inputs, stride, dweight)
    theirs = plain(*inputs, stride, dweight.shape, dweight.dtype)
    reference = plain(*doubled(*inputs), stride, dweight.shape, torch.float64)
    assert_close_to_reference(dweight, theirs, reference, name="dweight")


def out_shape(shape, filters, stride):
    n, _, h, w = shape
    return n, filters, (h - 1) // stride + 1, (w - 1) // stride + 1


@pytest.fixture
def multiprocessors(monkeypatch):
    """Sets how many multiprocessors the positions are divided among."""

    def use(count):
        monkeypatch.setattr(config, "_facts", lambda device: (config.MIN_ARCH, count))

    return use


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: TRITON_INTERPRET=1")
class TestNumbers:
    def inputs(self, shape, filters, stride, dtype):
        """du, y, y_stats, y_sums, x, x_stats and relu."""
        c, memory = shape[1], torch.channels_last
        du, y = (torch.randn(out_shape(shape, filters, stride)).to(dtype, memory_format=memory) for _ in "uy")
        x = torch.randn(shape).to(dtype, memory_format=memory)
        return du, y, torch.randn(5, filters), torch.randn(4, filters), x, torch.randn(5, c), True

    def check(self, shape, filters, side, stride=1, dtype=torch.float32, **without):
        inputs = self.inputs(shape, filters, stride, dtype)
        names = ("du", "y", "y_stats", "y_sums", "x", "x_stats", "relu")
        inputs = [without.get(name, value) for name, value in zip(names, inputs, strict=True)]
        close_to_plain(torch.empty(filters, shape[1], side, side, dtype=dtype), stride, *inputs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [1, 3])
    def test_taps_and_strides(self, side, stride, dtype, poisoned):
        self.check((3, 72, 9, 7), 40, side, stride, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "without",
        [
            {"x_stats": None},
            {"relu": False},
            {"y": None, "y_sums": None},
            {"y": None, "y_sums": None, "y_stats": None},
            {"y": None, "y_sums": None, "y_stats": None, "x_stats": None},
        ],
        ids=lambda without: ", ".join(without),
    )
    def test_without_a_prologue(self, without, dtype, poisoned):
        self.check((2, 16, 7, 6), 24, 3, 1, dtype, **without)
        self.check((2, 16, 7, 6), 24, 1, 2, dtype, **without)

    @pytest.mark.parametrize(
        ("shape", "filters", "side"),
        [
            *(((1, 8, 1, 2), 8, 3), ((2, 64, 8, 8), 64, 3), ((1, 136, 3, 5), 8, 3), ((1, 8, 3, 5), 136, 3)),
            *(((2, 64, 8, 8), 136, 1), ((1, 136, 3, 5), 136, 1)),
        ],
        ids=str,
    )
    def test_tails(self, shape, filters, side, poisoned):
        self.check(shape, filters, side)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize(
        "shape", [(40, 8, 1, 1), (17, 8, 3, 2), (3, 8, 1, 30), (2, 8, 33, 1), (2, 8, 5, 9)], ids=str
    )
    def test_images_smaller_and_larger_than_a_step(self, shape, stride, poisoned):
        self.check(shape, 8, 3, stride)

    # of 130 steps, the last one not full; 130 splits are more than the second kernel adds at once
    @pytest.mark.parametrize(
        ("count", "division"), [(1, (2, 65)), (2, (4, 33)), (4, (8, 17)), (99, (130, 1))], ids=str
    )
    def test_any_number_of_splits(self, count, division, multiprocessors, poisoned):
        multiprocessors(count)
        problem = ConvProblem(8, 61 * 68, 8, 1, 4)
        run = select("conv_wgrad", problem, config.MIN_ARCH)
        assert divide(run, problem, count)[1:] == division
        self.check((1, 8, 61, 68), 8, 1)

    def test_same_bits_twice(self, multiprocessors, poisoned):
        multiprocessors(3)
        inputs = self.inputs((3, 16, 9, 7), 24, 1, torch.float32)
        first, second = torch.empty(2, 24, 16, 3, 3)
        conv_wgrad(*inputs, 1, first)
        conv_wgrad(*inputs, 1, second)
        assert torch.equal(first, second)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("side", [1, 3])
    def test_layouts_and_dtypes_of_the_result(self, side, dtype, poisoned):
        # without prologues: to bfloat16 the interpreter truncates, and in float32 that would be seen
        du, *_, x, _, relu = self.inputs((2, 8, 5, 4), 16, 1, dtype)
        for out in {dtype, torch.float32}:
            room = torch.full((8, 16, 2 * side, side + 1), 7.0, dtype=out)
            for dweight in (
                torch.empty(16, 8, side, side, dtype=out),
                torch.empty(16, 8, side, side, dtype=out, memory_format=torch.channels_last),
                room.transpose(0, 1)[:, :, 1::2, :side],
            ):
                close_to_plain(dweight, 1, du, None, None, None, x, None, relu)
            assert (room[:, :, ::2] == 7).all() and (room[..., side:] == 7).all()

    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_mean_far_from_zero(self, stride, poisoned):
        """|mean| / std of y of 1e3: slope * y + (offset - slope * mean) would lose three digits."""
        du, y, y_stats, y_sums, *rest = self.inputs((2, 16, 9, 11), 24, stride, torch.float32)
        y += 1000
        y_stats[MEAN] = y.mean((0, 2, 3))
        close_to_plain(torch.empty(24, 16, 3, 3), stride, du, y, y_stats, y_sums, *rest)

    @pytest.mark.parametrize("side", [1, 3])
    def test_what_lies_past_the_end_may_overflow(self, side, poisoned):
        """Of a position with y = 0 or x = 0 the prologues would make an infinity in float16."""
        du, y, y_stats, y_sums, x, x_stats, relu = self.inputs((3, 16, 9, 7), 24, 1, torch.float16)
        y, x = y + 1000, x + 1000
        y_stats[MEAN], y_sums[SLOPE] = 1000, 100
        x_stats[SCALE], x_stats[SHIFT] = -100, 100_000
        dweight = torch.empty(24, 16, side, side)
        close_to_plain(dweight, 1, du, y, y_stats, y_sums, x, x_stats, relu)
        assert dweight.isfinite().all()

    def test_nan_comes_through(self, poisoned):
        du, y, y_stats, y_sums, x, x_stats, relu = self.inputs((2, 8, 5, 5), 8, 1, torch.float32)
        x[0, 3, 2, 2] = y[1, 5, 0, 0] = torch.nan
        dweight = torch.empty(8, 8, 1, 1)
        close_to_plain(dweight, 1, du, y, y_stats, y_sums, x, x_stats, relu)
        assert dweight[:, 3].isnan().all() and dweight[5].isnan().all() and dweight.isnan().sum() == 15

    def test_an_empty_batch(self, poisoned):
        inputs = self.inputs((0, 8, 5, 5), 8, 1, torch.float32)
        dweight = torch.empty(8, 8, 3, 3)
        conv_wgrad(*inputs, 1, dweight)
        assert (dweight == 0).all()

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [1, 3])
    def test_against_autograd(self, side, stride, poisoned):
        """batch norm, ReLU, conv, batch norm: the gradient of the weight, by PyTorch in one graph."""
        shape, filters = (3, 16, 9, 7), 24
        c, positions = shape[1], 3 * 9 * 7 if stride == 1 else 3 * 5 * 4
        x, weight = torch.randn(shape) + 3, torch.randn(filters, c, side, side)
        grad = torch.randn(out_shape(shape, filters, stride))
        norms = torch.randn(2, c), torch.randn(2, filters)

        def graph(dtype):
            w = weight.to(dtype).requires_grad_()
            first, second = (n.to(dtype) for n in norms)
            a = F.relu(F.batch_norm(x.to(dtype), None, None, *first, training=True, eps=EPS))
            y = F.conv2d(a, w, None, stride, side // 2)
            z = F.batch_norm(y, None, None, *second, training=True, eps=EPS)
            return y.detach(), *torch.autograd.grad(z, w, grad.to(dtype))

        def stats(t, norm):
            mean, var = t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0)
            rstd = (var + EPS).rsqrt()
            return torch.stack([mean, var, rstd, norm[0] * rstd, norm[1] - mean * norm[0] * rstd])

        y, reference = graph(torch.float64)
        _, theirs = graph(torch.float32)
        x_stats, y_stats = stats(x.double(), norms[0].double()), stats(y, norms[1].double())
        mean, scale = rows_of(y_stats, MEAN, SCALE)
        rstd = y_stats[2]
        dweight = (grad * (y - mean)).sum((0, 2, 3)) * rstd
        dbias = grad.double().sum((0, 2, 3))
        per_value = -scale.flatten() / positions
        y_sums = torch.stack([dbias, dweight, per_value * rstd * dweight, per_value * dbias])
        ours = torch.empty(weight.shape)
        memory = {"dtype": torch.float32, "memory_format": torch.channels_last}
        conv_wgrad(
            *(grad.to(**memory), y.to(**memory), y_stats.float(), y_sums.float()),
            *(x.to(**memory), x_stats.float(), True, stride, ours),
        )
        assert_close_to_reference(ours, theirs, reference, name="dweight")


class TestDivision:
    @pytest.mark.parametrize(
        ("channels", "filters", "taps", "positions"),
        [
            *((64, 64, 1, 802_816), (64, 64, 9, 802_816), (64, 256, 1, 802_816), (256, 64, 1, 802_816)),
            *((128, 128, 9, 200_704), (512, 128, 1, 200_704), (256, 256, 9, 50_176), (1024, 512, 1, 50_176)),
            *((512, 512, 9, 12_544), (512, 2048, 1, 12_544), (1024, 2048, 1, 12_544)),
        ],
    )
    def test_keeps_an_h100_busy(self, channels, filters, taps, positions):
        """ResNet-50's shapes, on 132 multiprocessors."""
        problem = ConvProblem(channels, positions, filters, taps, 2)
        run = select("conv_wgrad", problem, (9, 0))
        tiles, splits, steps = divide(run, problem, 132)
        assert tiles == -(-channels // run.block_m) * -(-filters // run.block_n) * taps
        assert (splits - 1) * steps * run.block_k < positions <= splits * steps * run.block_k
        programs = tiles * splits
        assert programs / (132 * -(-programs // 132)) > 0.85
        # no tile is half idle, and the partial sums are a fraction of what is read
        assert run.block_m <= channels and run.block_n <= filters
        assert splits * channels * filters * taps * 4 < 40e6


def compile_kernel(kernel, arch, dtype, constants, options):
    kinds = {"du": dtype, "y": dtype, "x": dtype, "dweight": dtype}
    kinds |= dict.fromkeys(("y_stats", "y_sums", "x_stats", "partial"), "fp32")
    signature = {
        name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
        for name in kernel.arg_names
    }
    return compile_for(arch, kernel, signature, constants, options)


TRAINED = [{"TAPS": 1}, {"TAPS": 9}, {"TAPS": 9, "STRIDE": 2}]
PLAIN_GRADIENT = {"y": None, "y_stats": None, "y_sums": None}
VARIANTS = [
    *TRAINED,
    {"TAPS": 1, "x_stats": None},
    {"TAPS": 1, "STRIDE": 2, "x_stats": None},
    {"TAPS": 9, "x_stats": None},
    {"TAPS": 9, "y": None, "y_sums": None},
    {"TAPS": 9, **PLAIN_GRADIENT},
    {"TAPS": 1, "x_stats": None, **PLAIN_GRADIENT},
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

    @pytest.mark.codegen
    @pytest.mark.parametrize("block_m", [1, 2, 4, 8, 16, 32, 64, 128])
    @pytest.mark.parametrize("taps", [1, 9])
    def test_finalize(self, arch, taps, block_m, tmp_path):
        constants = {"TAPS": taps, "BLOCK_M": block_m, "BLOCK_C": FINALIZED // block_m}
        compiled = compile_kernel(conv_wgrad_finalize_kernel, arch, "bf16", constants, {"num_warps": 4})
        used = usage(compiled, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
        assert re.search(r"ld\.global[^;]*\.v4\.b32", compiled.asm["ptx"])

    def check(self, arch, variant, dtype, tmp_path, *, only_first):
        itemsize = ITEMSIZES[dtype]
        capability = arch // 10, arch % 10
        shape = ConvProblem(256, 100_000, 256, variant["TAPS"], itemsize)
        valid = [c for c in CONFIGS["conv_wgrad"] if is_valid("conv_wgrad", c, shape, capability)]
        assert valid
        for run in valid[:1] if only_first else valid:
            constants = dict(run.keywords)
            options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
            constants |= {"STRIDE": 1, "RELU": True, "PRECISION": "tf32"} | variant
            constants["DIRECT"] = direct(capability, itemsize)
            compiled = compile_kernel(conv_wgrad_partial_kernel, arch, dtype, constants, options)
            assert compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{run} spills: {used}"
            ptx = compiled.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            gradients = 1 if "y" in variant else 2
            operands = (run.block_m + gradients * run.block_n) * run.block_k * itemsize
            each = operands // (run.num_warps * 32 * 16)
            assert len(copies) >= run.num_stages * each, f"{len(copies)} copies of 16 bytes"
            # nothing in the loop is copied bit by bit: the vectors of the prologues are loaded before it
            assert len(copies) == len(re.findall(r"cp\.async\.c[ga]", ptx))
            if itemsize == 2 and arch in (90, 100):
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
