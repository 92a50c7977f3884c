"""The CUDA convolutions on tensor cores against float64: conv_fwd and conv_bias_act, in the emulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from emulation import banks, build
from tolerances import assert_close_to_reference
from torch import Tensor

from fusedres import plan
from fusedres.kernels.rows import MEAN, SCALE, SHIFT, VAR

pytestmark = [
    pytest.mark.skipif(
        bool(build.unavailable()) or not build.is_set(), reason=build.unavailable() or "needs build.py --env"
    ),
    pytest.mark.usefixtures("poisoned"),
]

OPS = torch.ops.fusedres
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# so many multiprocessors that a shape of the tests gets the small tile, or so few that it gets the large one
SMALL, LARGE = 1000, 1


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    from emulation.cuda_on_cpu import cuda_on_cpu, module

    module().seed(0)
    with cuda_on_cpu():
        yield module()
    module().unwatch_all()
    module().count_banks(False)


@pytest.fixture
def use(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Sets the number of multiprocessors, which decides on the tile."""
    from fusedres.kernels.cuda import launch

    def of(multiprocessors: int) -> None:
        monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
        launch.forget_sizes()

    yield of
    launch.forget_sizes()


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In channels_last, with NaN before and behind: what is read outside shows."""
    n, c, h, w = shape
    around = torch.full((math.prod(shape) + 2048,), math.nan, dtype=dtype)
    inside = around[1024:-1024].view(n, h, w, c).permute(0, 3, 1, 2)
    return inside.copy_(torch.randn(shape))


def filters_of(number: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(number, channels, side, side) / math.sqrt(channels * side**2)
    return images(tuple(weight.shape), dtype).copy_(weight)


def as_tf32(t: Tensor) -> Tensor:
    """float32 with 10 bits behind the point, ties away from zero: what tensor cores multiply."""
    if t.dtype != torch.float32:
        return t
    mantissa, exponent = torch.frexp(t.double())
    return torch.ldexp(
        torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent
    ).float()


def activation(x: Tensor, stats: Tensor | None, relu: bool) -> Tensor:
    if stats is None:
        return x
    scale, shift = (stats[row].view(1, -1, 1, 1) for row in (SCALE, SHIFT))
    u = x.to(stats.dtype) * scale + shift
    return (F.relu(u) if relu else u).to(x.dtype)


def plain(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)


class Forward:
    """conv_fwd of one shape."""

    def __init__(self, shape, filters, side, stride, dtype, *, prologue=True, relu=True) -> None:
        torch.manual_seed(sum(shape) + filters)
        self.x, self.weight = images(shape, dtype), filters_of(filters, shape[1], side, dtype)
        self.stats = torch.randn(5, shape[1]) if prologue else None
        self.relu, self.stride = relu, stride
        self.norm = torch.randn(2, filters)

    def run(self, statistics: bool = True) -> tuple[Tensor, Tensor]:
        y, stats, _ = OPS.conv_fwd(
            *(
                self.x,
                self.stats,
                None,
                None,
                self.relu,
                self.weight,
                self.stride,
                *self.norm,
                EPS,
                statistics,
            )
        )
        return y, stats

    def check(self) -> None:
        y, stats = self.run()
        theirs = as_tf32(activation(self.x, self.stats, self.relu))
        exact = activation(self.x.double(), None if self.stats is None else self.stats.double(), self.relu)
        assert_close_to_reference(
            y,
            plain(theirs, as_tf32(self.weight), self.stride),
            plain(exact, self.weight.double(), self.stride),
            name="y",
        )
        weight, bias = self.norm.double()
        wide = y.double()
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
        rstd = (var + EPS).rsqrt()
        expected = (mean, var, rstd, weight * rstd, bias - mean * weight * rstd)
        for row, value in enumerate(expected):
            torch.testing.assert_close(stats[row].double(), value, rtol=2e-5, atol=2e-5)
        again, stats_again = self.run()
        assert torch.equal(y, again) and torch.equal(stats, stats_again)
        without, none = self.run(statistics=False)
        assert torch.equal(y, without) and none.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_taps_strides_and_prologue(use, prologue, side, stride, dtype):
    use(SMALL)
    Forward((3, 40, 7, 5), 72, side, stride, dtype, prologue=prologue).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [64, 136], ids=["narrow", "large"])
def test_tiles(use, filters, dtype):
    """Every tile, more of them than blocks, and the last a part."""
    use(LARGE)
    Forward((2, 24, 13, 12), filters, 3, 1, dtype).check()


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8, 1, 2), (5, 8, 2, 3), (2, 8, 6, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_tiny_images(use, stride, shape):
    use(SMALL)
    Forward(shape, 8, 3, stride, torch.float16).check()


def test_no_relu(use):
    use(SMALL)
    Forward((2, 16, 5, 5), 16, 3, 1, torch.bfloat16, relu=False).check()


@pytest.mark.parametrize("size", [(16, 16), (15, 17)], ids=["whole tiles", "a part"])
def test_a_mean_far_from_zero(use, size):
    """|mean| / std of about 1e3: sums of squares would keep nothing of the variance."""
    use(SMALL)
    x = (torch.ones(2, 8, *size) + 1e-3 * torch.randn(2, 8, *size)).to(memory_format=torch.channels_last)
    y, stats, _ = OPS.conv_fwd(x, None, None, None, True, torch.rand(8, 8, 1, 1), 1, None, None, EPS, True)
    mean, var = y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)
    assert (mean / var.sqrt()).min() > 300
    torch.testing.assert_close(stats[MEAN].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[VAR].double(), var, rtol=1e-4, atol=0)


def test_nan_stays(use):
    """In all filters of its position and nowhere else; at the border, the padding is 0."""
    use(SMALL)
    x = images((1, 8, 4, 4), torch.float16)
    x[0, 3, 1, 2] = math.nan
    y, _, _ = OPS.conv_fwd(
        x, torch.randn(5, 8), None, None, True, torch.randn(8, 8, 1, 1).half(), 1, None, None, EPS, False
    )
    assert torch.equal(y.isnan(), x.isnan().any(1, keepdim=True).expand_as(y))


class BiasAct:
    """conv_bias_act of one shape."""

    def __init__(self, shape, filters, side, stride, dtype, *, bias=True, residual=True, relu=True) -> None:
        torch.manual_seed(sum(shape) + filters)
        n, c, h, w = shape
        self.x, self.weight = images(shape, dtype), filters_of(filters, c, side, dtype)
        self.bias = torch.randn(filters) if bias else None
        out = (n, filters, (h - 1) // stride + 1, (w - 1) // stride + 1)
        self.residual = images(out, dtype) if residual else None
        self.relu, self.stride = relu, stride

    def run(self) -> Tensor:
        return OPS.conv_bias_act(self.x, self.weight, self.bias, self.residual, self.relu, self.stride)

    def of(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        z = plain(x, weight, self.stride)
        if self.bias is not None:
            z = z + self.bias.to(dtype).view(1, -1, 1, 1)
        if self.residual is not None:
            z = z + self.residual.to(dtype)
        return F.relu(z) if self.relu else z

    def check(self) -> None:
        z = self.run()
        eager = self.of(as_tf32(self.x), as_tf32(self.weight), self.x.dtype)
        exact = self.of(self.x.double(), self.weight.double(), torch.float64)
        assert_close_to_reference(z, eager, exact, name="z")
        assert torch.equal(z, self.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("side, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_bias_act(use, side, stride, residual, dtype):
    use(SMALL)
    BiasAct((2, 40, 7, 5), 72, side, stride, dtype, residual=residual).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", [64, 136], ids=["narrow", "large"])
def test_bias_act_tiles(use, filters, dtype):
    use(LARGE)
    BiasAct((2, 24, 13, 12), filters, 1, 1, dtype).check()


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_bias_act_options(use, bias, relu):
    use(SMALL)
    BiasAct((1, 8, 3, 3), 16, 3, 1, torch.bfloat16, bias=bias, relu=relu).check()


@pytest.mark.parametrize("name", ["conv_fwd", "conv_bias_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [SMALL, LARGE], ids=["small", "large"])
def test_traffic_and_banks(gpu, use, tile, dtype, name):
    """1x1: x and the weight are read once for each tile that needs them, y is written once, and no access of
    a warp to shared memory waits for a bank."""
    use(tile)
    shape, filters = (2, 64, 12, 12), 128
    case = (Forward if name == "conv_fwd" else BiasAct)(shape, filters, 1, 1, dtype)
    gpu.watch("x", case.x.data_ptr(), case.x.nbytes)
    gpu.watch("weight", case.weight.data_ptr(), case.weight.nbytes)
    if name == "conv_bias_act":
        gpu.watch("residual", case.residual.data_ptr(), case.residual.nbytes)
    gpu.reset()
    gpu.count_banks(True)
    case.run()
    assert banks.conflicts(gpu) == {}
    grid = gpu.launches()[0]["grid"]
    large = tile == LARGE
    kn = 128 if large and dtype != torch.float32 else 64
    assert grid[0] == filters // kn
    traffic = gpu.traffic()
    # the second column of tiles finds x in the cache, other rows of tiles the weight
    rows = math.ceil(2 * 12 * 12 / (128 if large else 64))
    for tensor, times in (("x", filters // kn), ("weight", rows)):
        whole = getattr(case, tensor).nbytes
        assert (traffic[tensor]["read"], traffic[tensor]["distinct_read"]) == (times * whole, whole), tensor
    if name == "conv_bias_act":
        assert traffic["residual"]["read"] == case.residual.nbytes
    written = 2 * 12 * 12 * filters * dtype.itemsize
    partial = 2 * filters * 4 * (grid[1] + 2.5) if name == "conv_fwd" else 0
    assert traffic["other"]["written"] == written + partial


@pytest.mark.parametrize("op", ["conv_fwd", "conv_bias_act"])
def test_float32_without_tf32_is_refused(gpu, op, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    problem = plan.Problem(op, "cpu", "float32", conv=plan.Conv(1, 8, 4, 4, 8, 1, 1, ieee=True))
    choice = plan.choose(problem, {}, "cuda")
    assert choice.implementation == "aten" and "allow_tf32" in choice.reason


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channels": 12}, "multiples of 8, got 12 and 8"),
        ({"side": 5}, "side must be 1 or 3"),
        ({"stride": 3}, "stride 1 or 2, got 1 and 3"),
        ({"n": 0}, "must not be empty"),
        ({"x": 8}, "multiple of 16 bytes"),
        ({"x": 0}, "x must not be null"),
        ({"n": 2**26, "height": 16}, "too large for int32"),
    ],
)
def test_what_the_binding_refuses(gpu, changes, message):
    sizes = {"n": 1, "height": 4, "width": 4, "channels": 8, "filters": 8, "side": 1, "stride": 1}
    addresses = {"x": 16, "weight": 16, "bias": 0, "residual": 0, "relu": True, "z": 16}
    arguments = {**sizes, **addresses} | changes
    with pytest.raises(ValueError, match=message):
        gpu.cuda_conv_bias_act("bfloat16", *arguments.values(), 1, 0)


class Bottleneck:
    """bottleneck_infer of one shape."""

    def __init__(self, shape: tuple[int, ...], inner: int, dtype: torch.dtype) -> None:
        torch.manual_seed(sum(shape))
        channels = shape[1]
        self.x = images(shape, dtype)
        self.weights = [
            filters_of(inner, channels, 1, dtype),
            filters_of(inner, inner, 3, dtype),
            filters_of(channels, inner, 1, dtype),
        ]
        # the first bias is far from 0: a border that is relu(bias) and not 0 would show
        self.biases = [torch.rand(inner) + 1, torch.randn(inner), torch.randn(channels)]

    def run(self) -> Tensor:
        pairs = zip(self.weights, self.biases, strict=True)
        return OPS.bottleneck_infer(self.x, *(t for pair in pairs for t in pair))

    def of(self, dtype: torch.dtype) -> Tensor:
        t = x = self.x.to(dtype)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            t = plain(t, weight.to(dtype), 1) + bias.to(dtype).view(1, -1, 1, 1)
            t = F.relu(t + x if i == 2 else t)
        return t

    def check(self) -> None:
        z = self.run()
        assert_close_to_reference(z, self.of(self.x.dtype), self.of(torch.float64), name="z")
        assert torch.equal(z, self.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, inner",
    [((1, 128, 5, 9), 64), ((2, 256, 18, 8), 64), ((1, 128, 3, 3), 128)],
    ids=["a part", "two tiles down", "wide"],
)
def test_bottleneck(gpu, shape, inner, dtype):
    Bottleneck(shape, inner, dtype).check()


def test_traffic_and_banks_of_a_bottleneck(gpu):
    """x twice (and the tiles' borders), z once, nothing between the convolutions; no bank is waited for."""
    block = Bottleneck((1, 128, 16, 8), 64, torch.bfloat16)
    gpu.watch("x", block.x.data_ptr(), block.x.nbytes)
    for i, weight in enumerate(block.weights):
        gpu.watch(f"weight{i}", weight.data_ptr(), weight.nbytes)
    gpu.reset()
    gpu.count_banks(True)
    block.run()
    assert banks.conflicts(gpu) == {}
    assert [launch["grid"] for launch in gpu.launches()] == [(1, 1, 1)]
    traffic = gpu.traffic()
    assert (traffic["x"]["read"], traffic["x"]["distinct_read"]) == (2 * block.x.nbytes, block.x.nbytes)
    for i, weight in enumerate(block.weights):
        assert traffic[f"weight{i}"]["read"] == weight.nbytes
    assert traffic["other"]["written"] == block.x.nbytes
