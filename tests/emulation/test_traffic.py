"""The bytes that every CUDA kernel loads and stores are those of its contract: no hidden second read."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulation import build
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(build.unavailable()) or not build.is_set(), reason=build.unavailable() or "needs build.py --env"
)

DTYPES = [torch.float32, torch.bfloat16]
# N, C, H, W: several blocks of rows; 16-byte columns, and channels that must go one by one
SHAPES = [(3, 64, 9, 8), (2, 5, 6, 7), (1, 272, 5, 5)]


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    from emulation.cuda_on_cpu import cuda_on_cpu, module

    with cuda_on_cpu():
        yield module()
    module().unwatch_all()


class Tensors:
    """Every full tensor that an op may touch, watched."""

    def __init__(self, gpu: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        n, c, h, w = shape
        pooled = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)

        def activation(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> Tensor:
            return torch.rand(shape).to(dtype).to(memory_format=torch.channels_last)

        names = ("x", "residual", "z", "grad", "du", "dx", "dresidual")
        self.full = {name: activation() for name in names}
        self.full |= {name: activation(pooled) for name in ("pooled", "pooled_grad")}
        index = torch.randint(0, 10, pooled, dtype=torch.uint8)
        self.full["index"] = index.contiguous(memory_format=torch.channels_last)
        self.full |= {name: torch.rand(n, c, 1, 1).to(dtype) for name in ("means", "means_grad")}
        self.stats, self.residual_stats = torch.rand(5, c), torch.rand(5, c)
        self.sums, self.residual_sums = torch.rand(4, c), torch.rand(4, c)
        gpu.unwatch_all()
        for name, tensor in self.full.items():
            gpu.watch(name, tensor.data_ptr(), tensor.nbytes)
        gpu.reset()

    def __getattr__(self, name: str) -> Tensor:
        return self.full[name]


# op, how it is called on Tensors, what it reads and writes of them, each exactly once
CONTRACTS = {
    "bn_stats": (lambda k, t: k.bn_stats(t.x, None, None, 1e-5, t.stats), "x", ""),
    "bn_act": (lambda k, t: k.bn_act(t.x, t.stats, None, None, True, t.z), "x", "z"),
    "bn_act, residual": (
        lambda k, t: k.bn_act(t.x, t.stats, t.residual, None, True, t.z),
        "x residual",
        "z",
    ),
    "bn_act, normalised residual": (
        lambda k, t: k.bn_act(t.x, t.stats, t.residual, t.residual_stats, True, t.z),
        "x residual",
        "z",
    ),
    "bn_act_backward_reduce": (
        lambda k, t: k.bn_act_backward_reduce(
            t.grad, t.x, None, t.stats, None, None, True, None, t.sums, None
        ),
        "grad x",
        "",
    ),
    "bn_act_backward_reduce, residual": (
        lambda k, t: k.bn_act_backward_reduce(
            t.grad, t.x, t.z, t.stats, None, None, True, t.du, t.sums, None
        ),
        "grad z x",
        "du",
    ),
    "bn_act_backward_reduce, normalised residual": (
        lambda k, t: k.bn_act_backward_reduce(
            t.grad, t.x, t.z, t.stats, t.residual, t.residual_stats, True, t.du, t.sums, t.residual_sums
        ),
        "grad z x residual",
        "du",
    ),
    "bn_act_backward_reduce, in place": (
        lambda k, t: k.bn_act_backward_reduce(
            t.grad, t.x, t.z, t.stats, None, None, True, t.grad, t.sums, None
        ),
        "grad z x",
        "grad",
    ),
    "bn_act_backward_apply": (
        lambda k, t: k.bn_act_backward_apply(
            t.grad, t.x, t.stats, t.sums, None, None, None, True, t.dx, None
        ),
        "grad x",
        "dx",
    ),
    "bn_act_backward_apply, behind the ReLU": (
        lambda k, t: k.bn_act_backward_apply(t.du, t.x, t.stats, t.sums, None, None, None, False, t.dx, None),
        "du x",
        "dx",
    ),
    "bn_act_backward_apply, normalised residual": (
        lambda k, t: k.bn_act_backward_apply(
            *(t.du, t.x, t.stats, t.sums, t.residual, t.residual_stats, t.residual_sums),
            *(False, t.dx, t.dresidual),
        ),
        "du x residual",
        "dx dresidual",
    ),
    "bn_act_backward_apply, fixed statistics": (
        lambda k, t: k.bn_act_backward_apply(t.du, t.x, t.stats, None, None, None, None, False, t.dx, None),
        "du",
        "dx",
    ),
    "bn_act_backward_apply, fixed statistics and a ReLU": (
        lambda k, t: k.bn_act_backward_apply(t.grad, t.x, t.stats, None, None, None, None, True, t.dx, None),
        "grad x",
        "dx",
    ),
    "global_avg_pool": (lambda k, t: k.global_avg_pool(t.x, t.means), "x", "means"),
    "global_avg_pool_backward": (
        lambda k, t: k.global_avg_pool_backward(t.means_grad, t.dx),
        "means_grad",
        "dx",
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONTRACTS)
def test_traffic(gpu, name, dtype, shape):
    from fusedres.kernels import cuda

    run, reads, writes = CONTRACTS[name]
    tensors = Tensors(gpu, shape, dtype)
    run(cuda, tensors)
    traffic = gpu.traffic()
    for tensor, values in tensors.full.items():
        read, written = (values.nbytes if tensor in names.split() else 0 for names in (reads, writes))
        if tensor == "means_grad" and read:  # of a block's column, by each of its rows; it is small
            assert traffic[tensor]["distinct_read"] == read
            continue
        found = traffic[tensor]
        if name == "bn_stats" and tensor == "x":
            # and its first row, the pivot, again by each row of threads and once at the end
            first = gpu.launches()[0]
            row = values.nbytes // (shape[0] * shape[2] * shape[3])
            read += row * (first["grid"][1] * first["block"][1] + 1)
            assert (found["read"], found["distinct_read"]) == (read, values.nbytes)
            continue
        assert (found["read"], found["distinct_read"]) == (read, read), tensor
        assert (found["written"], found["distinct_written"]) == (written, written), tensor


MAXPOOL = {
    "bn_relu_maxpool": (
        lambda k, t: k.bn_relu_maxpool(t.x, t.stats, t.pooled, t.index),
        "x",
        "pooled index",
    ),
    "bias_relu_maxpool": (lambda k, t: k.bias_relu_maxpool(t.x, t.stats[0], t.pooled), "x", "pooled"),
    "bias_relu_maxpool, no bias": (lambda k, t: k.bias_relu_maxpool(t.x, None, t.pooled), "x", "pooled"),
    "bn_relu_maxpool_backward_reduce": (
        lambda k, t: k.bn_relu_maxpool_backward_reduce(t.pooled_grad, t.index, t.x, t.stats, t.sums),
        "pooled_grad index x",
        "",
    ),
    "bn_relu_maxpool_backward_apply": (
        lambda k, t: k.bn_relu_maxpool_backward_apply(t.pooled_grad, t.index, t.x, t.stats, t.sums, t.dx),
        "pooled_grad index x",
        "dx",
    ),
    "bn_relu_maxpool_backward_apply, fixed statistics": (
        lambda k, t: k.bn_relu_maxpool_backward_apply(t.pooled_grad, t.index, t.x, t.stats, None, t.dx),
        "pooled_grad index",
        "dx",
    ),
}


@pytest.mark.parametrize("shape", [(2, 64, 17, 18), (1, 5, 33, 6)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAXPOOL)
def test_traffic_of_the_pool(gpu, name, dtype, shape):
    """Windows overlap, so neighbours load a pixel again, out of the cache; in memory each byte moves once.

    Forward a pixel is loaded 3/2 times (columns overlap, rows are carried along, but at a strip's top);
    backward a window is loaded 2 times (with the column to its right, rows carried along likewise).
    """
    from fusedres.kernels import cuda

    run, reads, writes = MAXPOOL[name]
    tensors = Tensors(gpu, shape, dtype)
    run(cuda, tensors)
    traffic = gpu.traffic()
    backward = "backward" in name
    strip_top = 1 + 1 / 8 if backward else 1 + 1 / 16
    for tensor, values in tensors.full.items():
        found = traffic[tensor]
        written = values.nbytes if tensor in writes.split() else 0
        assert (found["written"], found["distinct_written"]) == (written, written), tensor
        if tensor not in reads.split():
            assert found["read"] == 0, tensor
            continue
        assert found["distinct_read"] == values.nbytes, tensor
        again = 1.0 if backward and tensor == "x" else (2.0 if backward else 1.5) * strip_top
        # a last strip may be short
        assert found["read"] <= values.nbytes * again * 1.15, (tensor, found["read"] / values.nbytes)
        assert again > 1 or found["read"] == values.nbytes


def test_traffic_of_the_casts(gpu):
    from fusedres.kernels import cuda

    weights = [torch.randn(8, 3, 7, 7), torch.randn(9, 4, 1, 1), torch.randn(300, 8, 1, 1)]
    casts = [w.to(torch.bfloat16, memory_format=torch.channels_last) for w in weights]
    gpu.unwatch_all()
    for i, (weight, cast) in enumerate(zip(weights, casts, strict=True)):
        gpu.watch(f"weight {i}", weight.data_ptr(), weight.nbytes)
        gpu.watch(f"cast {i}", cast.data_ptr(), cast.nbytes)
    gpu.reset()
    cuda.cast_weights(weights, casts)
    traffic = gpu.traffic()
    for i, (weight, cast) in enumerate(zip(weights, casts, strict=True)):
        moved = traffic[f"weight {i}"], traffic[f"cast {i}"]
        assert (moved[0]["read"], moved[0]["distinct_read"]) == (weight.nbytes, weight.nbytes)
        assert (moved[1]["written"], moved[1]["distinct_written"]) == (cast.nbytes, cast.nbytes)
    assert len(gpu.launches()) == 1


def test_a_second_read_is_seen(gpu):
    """The counters count: the same op twice reads x twice, and its bytes are still so many."""
    from fusedres.kernels import cuda

    tensors = Tensors(gpu, SHAPES[0], torch.float32)
    for _ in range(2):
        cuda.bn_act(tensors.x, tensors.stats, None, None, True, tensors.z)
    found = gpu.traffic()["x"]
    assert (found["read"], found["distinct_read"]) == (2 * tensors.x.nbytes, tensors.x.nbytes)
