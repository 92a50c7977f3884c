"""The gradient of a convolution's input: its numbers, and what compilers make of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re

import pytest
import torch
import torch.nn.functional as F
from emulation import build
from tolerances import assert_close_to_reference
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

from fusedres import kernels
from fusedres.kernels.rows import DBIAS, DWEIGHT, MEAN, OFFSET, RSTD, SCALE, SHIFT, SLOPE

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = build.is_set()  # the CUDA kernel, which is of stride 1
STRIDES = [1] if EMULATED else [1, 2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
NO_Y = {"y": None, "y_sums": None}
NO_NORM_BEHIND = NO_Y | {"y_stats": None}
NO_NORM_AHEAD = {"x": None, "x_stats": None, "x_sums": None}


def rows_of(matrix, *rows):
    return (matrix[row].view(1, -1, 1, 1) for row in rows)


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def out_size(size, stride):
    return (size - 1) // stride + 1


def as_multiplied(t):
    """A float32 operand as tensor cores take it: 10 bits behind the point, ties away from zero."""
    if t.dtype != torch.float32 or not EMULATED:
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def plain(du, y, y_stats, y_sums, weight, stride, add, first, x, x_stats, relu, shape):
    """The same by PyTorch, in the dtype of du; where that is float32, in the precision of the kernel."""
    dy = du
    if y_stats is not None:
        scale, mean = rows_of(y_stats, SCALE, MEAN)
        dy = scale * du.to(y_stats.dtype)
        if y_sums is not None:
            slope, offset = rows_of(y_sums, SLOPE, OFFSET)
            dy += slope * (y.to(y_stats.dtype) - mean) + offset
        dy = dy.to(du.dtype)
    operands = as_multiplied(weight), as_multiplied(dy)
    dx = torch.nn.grad.conv2d_input(shape, *operands, stride, weight.shape[2] // 2)
    if add is not None:
        place = dx if add.shape[2:] == dx.shape[2:] else dx[:, :, ::2, ::2]
        place += add[:, first : first + dx.shape[1]]
    if x_stats is not None and relu:
        scale, shift = rows_of(x_stats.double(), SCALE, SHIFT)
        dx[x.double() * scale + shift <= 0] = 0
    return dx


def sums_of(dx, x, stats):
    """dbias, dweight, slope and offset."""
    dbias = dx.sum((0, 2, 3))
    dweight = (dx * (x - stats[MEAN].view(1, -1, 1, 1))).sum((0, 2, 3)) * stats[RSTD]
    per_value = -stats[SCALE] * dx.shape[1] / dx.numel()
    return torch.stack([dbias, dweight, per_value * stats[RSTD] * dweight, per_value * dbias])


def doubled(*values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.skipif(
    not INTERPRETED and not EMULATED,
    reason="runs in Triton's interpreter (TRITON_INTERPRET=1) and in the emulation of CUDA (build.py --env)",
)
class TestNumbers:
    @pytest.fixture(autouse=True)
    def implementation(self):
        """Every kernel by the implementation that runs here."""
        with contextlib.ExitStack() as stack:
            if EMULATED:
                from emulation.cuda_on_cpu import cuda_on_cpu, module

                module().seed(0)
                stack.enter_context(cuda_on_cpu())
            self.run = kernels.load("cuda" if EMULATED else "triton").conv_dgrad
            yield

    def inputs(self, shape, filters, side, stride, dtype, changes):
        """The arguments of conv_dgrad up to relu."""
        n, c, h, w = shape
        out = (n, filters, out_size(h, stride), out_size(w, stride))
        weight = torch.randn(filters, c, side, side) / (filters * side * side) ** 0.5
        values = {
            "du": channels_last(*out, dtype=dtype),
            "y": channels_last(*out, dtype=dtype),
            "y_stats": torch.randn(5, filters),
            "y_sums": torch.randn(4, filters),
            "weight": weight.to(dtype).to(memory_format=torch.channels_last),
            "stride": stride,
            "add": None,
            "first": 0,
            "x": channels_last(*shape, dtype=dtype),
            "x_stats": torch.randn(5, c),
            "relu": True,
        }
        return list((values | {k: v for k, v in changes.items() if k in values}).values())

    def check(self, shape, filters, side, stride=1, dtype=torch.float32, **changes):
        inputs = self.inputs(shape, filters, side, stride, dtype, changes)
        x, x_stats = inputs[8:10]
        dx = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        x_sums = changes.get("x_sums", torch.empty(4, shape[1]))
        self.run(*inputs, dx, x_sums)
        theirs, reference = plain(*inputs, shape), plain(*doubled(*inputs), shape)
        assert_close_to_reference(dx, theirs, reference, name="dx")
        again = torch.empty_like(dx)
        if x_sums is None:
            self.run(*inputs, again, None)
        else:
            # the sums are those of the values that were stored
            theirs, reference = sums_of(dx.float(), x.float(), x_stats), sums_of(*doubled(dx, x, x_stats))
            for ours, *others in zip(x_sums, theirs, reference, strict=True):
                assert_close_to_reference(ours, *others, terms=others[1].abs().max().item(), name="sums")
            again_sums = torch.empty_like(x_sums)
            self.run(*inputs, again, again_sums)
            assert torch.equal(again_sums, x_sums)
        assert torch.equal(again, dx)
        return dx

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("side", [1, 3])
    def test_taps_and_strides(self, side, stride, dtype, poisoned):
        self.check((3, 72, 9, 7), 40, side, stride, dtype)

    @pytest.mark.parametrize(
        "changes",
        [
            NO_Y,
            NO_NORM_BEHIND,
            NO_NORM_AHEAD,
            NO_NORM_BEHIND | NO_NORM_AHEAD,
            {"x_sums": None},
            {"relu": False},
            {"relu": False, "x_sums": None},
        ],
        ids=lambda changes: ",".join(changes),
    )
    @pytest.mark.parametrize("side", [1, 3])
    def test_without(self, side, changes, poisoned):
        self.check((2, 24, 5, 6), 16, side, STRIDES[-1], torch.float16, **changes)

    @pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("side", [1, 3])
    @pytest.mark.parametrize("size", [(6, 4), (5, 7)], ids=str)
    def test_add(self, size, side, stride, compact, poisoned):
        """A gradient by another way: channels 8 to 31 of 40."""
        add = channels_last(2, 40, *(out_size(s, 2) if compact else s for s in size))
        self.check((2, 24, *size), 16, side, stride, add=add, first=8)

    @pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=str)
    def test_add_to_one_pixel(self, memory):
        """Where sizes are 1 both layouts are the same, and strides mean nothing."""
        add = torch.randn(3, 24, 1, 1).contiguous(memory_format=memory)
        self.check((3, 16, 1, 1), 8, 3, add=add, first=8)

    @pytest.mark.parametrize("stride", STRIDES)
    def test_add_in_place(self, stride):
        shape, dtype = (2, 24, 7, 5), torch.float16
        add = channels_last(*shape, dtype=dtype)
        inputs = self.inputs(
            shape, 16, 3, stride, dtype, {"add": add.clone(memory_format=torch.channels_last)}
        )
        reference = plain(*doubled(*inputs), shape)
        theirs = plain(*inputs, shape)
        sums = torch.empty(4, 24)
        inputs[6] = add
        self.run(*inputs, add, sums)
        assert_close_to_reference(add, theirs, reference, name="dx")

    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize(
        ("shape", "filters"),
        [((1, 8, 1, 2), 136), ((2, 64, 8, 8), 64), ((3, 136, 1, 1), 8), ((1, 136, 3, 5), 72)],
        ids=str,
    )
    def test_tails(self, shape, filters, stride, poisoned):
        self.check(shape, filters, 3, stride)

    @pytest.mark.parametrize("changes", [{}, NO_NORM_BEHIND], ids=["prologue", "plain"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_tiles(self, dtype, changes, poisoned):
        self.check((1, 136, 18, 16), 24, 1, 1, dtype, **changes)

    @pytest.mark.parametrize("stride", STRIDES)
    def test_more_tiles_than_a_group(self, stride):
        self.check((1, 72, 36, 32), 8, 1, stride)

    def test_a_nan_goes_through_the_relu(self):
        x = channels_last(2, 16, 5, 5)
        x[0, 3, 2, 2] = float("nan")
        dx = self.check((2, 16, 5, 5), 8, 3, x=x, x_sums=None)
        assert dx[0, 3, 2, 2] != 0

    def test_the_mask_is_that_of_the_stored_output(self):
        """1e-9 is 0 in float16."""
        inputs = self.inputs((1, 8, 4, 4), 8, 3, 1, torch.float16, {"x_stats": torch.full((5, 8), 1e-9)})
        inputs[8] = torch.ones_like(inputs[8])
        dx = torch.empty_like(inputs[8])
        self.run(*inputs, dx, None)
        assert dx.count_nonzero() == 0

    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("side", [1, 3])
    def test_means_far_from_zero(self, side, stride, poisoned):
        """|mean| / std of 1e3: (y - mean) and (x - mean) are small, slope * mean and x * du aren't."""
        n, c, h, w, k = 2, 16, 9, 7, 24
        y = (1000 + channels_last(n, k, out_size(h, stride), out_size(w, stride))).contiguous(
            memory_format=torch.channels_last
        )
        x = (1000 + channels_last(n, c, h, w)).contiguous(memory_format=torch.channels_last)
        y_stats, x_stats = torch.randn(5, k), torch.randn(5, c)
        y_stats[MEAN], x_stats[MEAN] = 1000, 1000
        x_stats[SHIFT] = -1000 * x_stats[SCALE]
        self.check((n, c, h, w), k, side, stride, y=y, y_stats=y_stats, x=x, x_stats=x_stats)

    @pytest.mark.parametrize("stride", STRIDES)
    @pytest.mark.parametrize("side", [1, 3])
    def test_between_two_batch_norms(self, side, stride, poisoned):
        """relu(bn(conv(relu(bn(x))))) by autograd: the gradient behind the first norm, and its sums."""
        n, c, k, h, w = 3, 16, 24, 7, 6
        leaves = {
            "x": 3 + 2 * torch.randn(n, c, h, w),
            "weight": torch.randn(k, c, side, side) / (c * side * side) ** 0.5,
            "a": torch.rand(c) + 0.5,
            "b": torch.randn(c),
            "g": torch.rand(k) + 0.5,
            "h": torch.randn(k),
        }
        loss = torch.randn(n, k, out_size(h, stride), out_size(w, stride))

        def run(dtype):
            """By autograd: the three results, and what the backward brings to the convolution."""
            v = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
            u = F.batch_norm(v["x"], None, None, v["a"], v["b"], True, 0, EPS)
            y = F.conv2d(F.relu(u), v["weight"], stride=stride, padding=side // 2)
            t = F.batch_norm(y, None, None, v["g"], v["h"], True, 0, EPS)
            z = (F.relu(t) * loss.to(dtype)).sum()
            return *torch.autograd.grad(z, (u, v["b"], v["a"], t)), y.detach()

        def stats(y, weight, bias):
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            rstd = (var + EPS).rsqrt()
            return torch.stack([mean, var, rstd, weight * rstd, bias - mean * weight * rstd])

        *reference, du, y = run(torch.float64)
        x = leaves["x"].double()
        x_stats, y_stats = stats(x, leaves["a"], leaves["b"]), stats(y, leaves["g"], leaves["h"])
        y_sums = sums_of(du, y, y_stats)
        du, y, x, weight = (
            v.float().contiguous(memory_format=torch.channels_last) for v in (du, y, x, leaves["weight"])
        )
        dx, x_sums = torch.empty_like(x), torch.empty(4, c)
        prologue = (du, y, y_stats.float(), y_sums.float())
        self.run(*prologue, weight, stride, None, 0, x, x_stats.float(), True, dx, x_sums)
        ours = (dx, x_sums[DBIAS], x_sums[DWEIGHT])
        if EMULATED:
            theirs = plain(*prologue, weight, stride, None, 0, x, x_stats.float(), True, x.shape)
            theirs = (theirs, *sums_of(theirs, x, x_stats.float())[[DBIAS, DWEIGHT]])
        else:
            *theirs, _, _ = run(torch.float32)
        for name, *values in zip(("du", "dbias", "dweight"), ours, theirs, reference, strict=True):
            assert_close_to_reference(*values, name=name)


def compile_kernel(config, dtype, arch, variant):
    from fusedres.kernels.triton.conv_common import direct
    from fusedres.kernels.triton.conv_dgrad import conv_dgrad_kernel

    launch = dict(config.keywords)
    options = {k: launch.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
    constants = {"STRIDE": 1, "COMPACT": False, "RELU": True, "EVEN": True, "PRECISION": "tf32"}
    constants["DIRECT"] = direct((arch // 10, arch % 10), ITEMSIZES[dtype])
    constants |= launch | variant
    kinds = dict.fromkeys(("du", "y", "weight", "add", "x", "dx"), dtype)
    kinds |= dict.fromkeys(("y_stats", "y_sums", "x_stats", "partial"), "fp32")
    signature = {
        name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
        for name in conv_dgrad_kernel.arg_names
    }
    return compile_for(arch, conv_dgrad_kernel, signature, constants, options)


# a bottleneck's three convolutions, the first with the gradient of the shortcut
TRAINED = [
    {"TAPS": 1, "add": None},
    {"TAPS": 9, "STRIDE": 2, "add": None},
    {"TAPS": 1, "x": None, "x_stats": None, "partial": None},
]
NO_NORMS = dict.fromkeys(("y", "y_stats", "y_sums", "add", "x", "x_stats", "partial"))
VARIANTS = [
    *TRAINED,
    {"TAPS": 1},
    {"TAPS": 1, "COMPACT": True, "EVEN": False},
    {"TAPS": 1, "STRIDE": 2},
    {"TAPS": 1, "y": None, "y_sums": None},
    {"TAPS": 1, **NO_NORMS},
    {"TAPS": 9, "add": None},
    {"TAPS": 9, "COMPACT": True, "EVEN": False},
    {"TAPS": 9, "STRIDE": 2, "COMPACT": True},
    {"TAPS": 9, "partial": None},
    {"TAPS": 9, "y": None, "y_sums": None},
    {"TAPS": 9, "STRIDE": 2, "EVEN": False},
    {"TAPS": 9, **NO_NORMS},
]


def named(variant):
    return ",".join(f"{k}={v}" if v is not None else f"no_{k}" for k, v in variant.items())


@pytest.mark.skipif(not TRITON, reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(EMULATED, reason="the emulation is of the CUDA kernel")
@pytest.mark.parametrize("arch", SHARED_KIB)
class TestCode:
    @pytest.mark.parametrize("variant", TRAINED, ids=named)
    def test_first_choice(self, arch, variant, tmp_path):
        self.check(arch, variant, "bf16", tmp_path, only_first=True)

    @pytest.mark.codegen
    @pytest.mark.parametrize("dtype", ITEMSIZES)
    @pytest.mark.parametrize("variant", VARIANTS, ids=named)
    def test_everything_shipped(self, arch, variant, dtype, tmp_path):
        self.check(arch, variant, dtype, tmp_path, only_first=False)

    def check(self, arch, variant, dtype, tmp_path, *, only_first):
        from fusedres.kernels.triton.conv_config import CONFIGS, ConvProblem, is_valid, shared_bytes

        itemsize = ITEMSIZES[dtype]
        kernel = "conv_dgrad" if itemsize < 4 else "conv_dgrad_fp32"
        problem = ConvProblem(100_000, 256, 256, variant["TAPS"], itemsize)
        valid = [c for c in CONFIGS[kernel] if is_valid(kernel, c, problem, (arch // 10, arch % 10))]
        assert valid
        for config in valid[:1] if only_first else valid:
            compiled = compile_kernel(config, dtype, arch, variant)
            assert compiled.metadata.shared <= shared_bytes(kernel, config, problem)
            assert config.programs_per_sm * compiled.metadata.shared <= SHARED_KIB[arch] * 1024
            used = usage(compiled, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, f"{config} spills: {used}"
            ptx = compiled.asm["ptx"]
            copies = re.findall(r"cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
            gradients = 1 if "y_sums" in variant else 2
            operands = (gradients * config.block_m + config.block_n) * config.block_k * itemsize
            each = operands // (config.num_warps * 32 * 16)
            assert len(copies) >= config.num_stages * each, f"{len(copies)} copies of 16 bytes"
            if itemsize == 2 and arch in (90, 100):
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in ptx
