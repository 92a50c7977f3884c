"""conv_dgrad's tiles in the emulation of CUDA: several for a block, what they load and store, their banks."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from chain_case import ChainCase, call
from emulation import banks, build
from fused_ops import FusedOps
from torch import Tensor

from fusedres.kernels.rows import DBIAS, DWEIGHT, MEAN, RSTD

pytestmark = pytest.mark.skipif(
    bool(build.unavailable()) or not build.is_set(), reason=build.unavailable() or "needs build.py --env"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = 40  # more than a stage has, and not as much as two
LEAST_SHARED_BYTES = 99 * 1024  # of a block: compute capability 8.6, 8.9 and 12.0
# N, C, H, W, for small tiles and, of which a block of one multiprocessor takes several, for large ones
SHAPES = {"small": (1, 40, 9, 8), "large": (1, 128, 18, 16)}


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    from emulation.cuda_on_cpu import cuda_on_cpu, module

    module().seed(0)
    with cuda_on_cpu(multiprocessors=1):
        yield module()
    module().count_banks(False)
    module().unwatch_all()


def activation(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


class Call:
    """conv_dgrad on tensors that are watched; ``without`` some of them, ``compact``: add is."""

    def __init__(
        self,
        gpu: ModuleType,
        shape: tuple[int, int, int, int],
        side: int,
        dtype: torch.dtype,
        without: str = "",
        compact: bool = False,
    ) -> None:
        n, channels, h, w = shape
        added = ((size + 1) // 2 for size in (h, w)) if compact else (h, w)
        self.full = {
            "du": activation(n, FILTERS, h, w, dtype=dtype),
            "y": activation(n, FILTERS, h, w, dtype=dtype),
            "weight": activation(FILTERS, channels, side, side, dtype=dtype),
            "add": activation(n, channels, *added, dtype=dtype),
            "x": activation(*shape, dtype=dtype),
            "dx": torch.empty(shape, dtype=dtype, memory_format=torch.channels_last),
        }
        self.vectors = {"y_stats": torch.randn(5, FILTERS), "y_sums": torch.randn(4, FILTERS)}
        self.vectors |= {"x_stats": torch.randn(5, channels), "x_sums": torch.empty(4, channels)}
        gpu.unwatch_all()
        for name, tensor in self.full.items():
            gpu.watch(name, tensor.data_ptr(), tensor.nbytes)
        gpu.reset()
        given = {k: v for k, v in (self.full | self.vectors).items() if k not in without.split()}

        def these(*names: str) -> list[Tensor | None]:
            return [given.get(name) for name in names]

        from fusedres.kernels import cuda

        cuda.conv_dgrad(
            *(*these("du", "y", "y_stats", "y_sums"), self.full["weight"], 1, *these("add"), 0),
            *(*these("x", "x_stats"), "x" in given, self.full["dx"], *these("x_sums")),
        )


@pytest.mark.parametrize("tile", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_the_tiles_of_a_block(gpu, dtype, tile):
    call = Call(gpu, SHAPES[tile], 1, dtype)
    launch, _ = gpu.launches()
    assert launch["block"][0] == {"small": 128, "large": 256}[tile]
    assert launch["shared_bytes"] <= LEAST_SHARED_BYTES
    if tile == "large":
        n, _, h, w = SHAPES[tile]
        assert launch["grid"][1] < n * h * w / 128
    dx, x, stats = (t.double() for t in (call.full["dx"], call.full["x"], call.vectors["x_stats"]))
    product = (dx * (x - stats[MEAN].view(1, -1, 1, 1))).sum((0, 2, 3)) * stats[RSTD]
    sums = call.vectors["x_sums"].double()
    torch.testing.assert_close(sums[DBIAS], dx.sum((0, 2, 3)), rtol=1e-5, atol=1e-5 * dx.abs().sum())
    torch.testing.assert_close(sums[DWEIGHT], product, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dgrads"),
    [
        ("bottleneck", 3),  # all, the first one with the gradient of the shortcut
        ("bottleneck, projection", 3),  # all but that of stride 2; of every second pixel the projection's
        ("basic, padded", 1),
    ],
)
def test_block(gpu, kind, dgrads):
    """In training: the other convolutions are PyTorch's."""
    gpu.reset()
    with FusedOps() as ops:
        ChainCase(kind, torch.bfloat16).run(call)
    assert ops.calls["conv_dgrad"] == dgrads
    ChainCase(kind, torch.bfloat16).check()


def test_what_begins_between_accesses(gpu):
    """Tensors at any address, and channels of a shortcut from any one on."""
    from fusedres.kernels import cuda

    n, channels, h, w = SHAPES["small"]
    du = activation(n, FILTERS, h, w, dtype=torch.float16)
    weight, add = (activation(*s, dtype=torch.float16) for s in ((FILTERS, channels, 1, 1), (n, 50, h, w)))
    moved = torch.empty(du.numel() + 1, dtype=du.dtype)[1:].view(n, h, w, FILTERS).permute(0, 3, 1, 2)
    moved.copy_(du)
    assert moved.data_ptr() % 16 and moved.is_contiguous(memory_format=torch.channels_last)
    shortcut = add[:, 3 : 3 + channels].contiguous(memory_format=torch.channels_last)
    results = [torch.empty_like(shortcut) for _ in range(2)]
    nothing = None, None, False
    cuda.conv_dgrad(du, None, None, None, weight, 1, shortcut, 0, *nothing, results[0], None)
    cuda.conv_dgrad(moved, None, None, None, weight, 1, add, 3, *nothing, results[1], None)
    assert torch.equal(*results) and results[0].isfinite().all()


# what isn't there, and what then is read
VARIANTS = {
    "": "du y add x",
    "add x x_stats x_sums": "du y",
    "add y_sums": "du x",
    "x_sums": "du y add x",
    "y y_stats y_sums add x x_stats x_sums": "du",
}


@pytest.mark.parametrize(
    ("tile", "side", "compact", "without"),
    [
        *(("small", side, compact, "") for side in (1, 3) for compact in (False, True)),
        *(("small", 1, False, without) for without in VARIANTS if without),
        ("large", 1, True, ""),
    ],
)
def test_traffic(gpu, tile, side, compact, without):
    """Each byte once: add, x and dx; those of the product for each column of tiles, a 3x3's for each tap."""
    dtype = torch.bfloat16
    call = Call(gpu, SHAPES[tile], side, dtype, without, compact)
    traffic = gpu.traffic()
    for name, tensor in call.full.items():
        found = traffic[name]
        read = tensor.nbytes if name in (VARIANTS[without] + " weight").split() else 0
        written = tensor.nbytes if name == "dx" else 0
        assert (found["written"], found["distinct_written"]) == (written, written), name
        assert found["distinct_read"] == read, name
        if name not in ("du", "y", "weight") or (side == 1 and name != "weight"):
            assert found["read"] == read, name


@pytest.mark.parametrize("tile", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_no_bank_waits_in_the_main_loop(gpu, dtype, tile):
    """With its prologue, which has every access that it has without."""
    gpu.count_banks(True)
    Call(gpu, SHAPES[tile], 1, dtype)
    counted = banks.by_place(gpu)
    main_loop = [place for place in counted if place.startswith(("conv_transposed", "conv_tile"))]
    assert sum(counted[place]["accesses"] for place in main_loop) > 100
    assert not any(counted[place]["conflicts"] for place in main_loop), counted
