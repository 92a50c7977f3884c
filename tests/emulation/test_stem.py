"""The stem's CUDA kernels: the bytes that they load and store, and the banks of shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulation import banks, build
from torch import Tensor

from fusedres.kernels.rows import pixels_shape

pytestmark = pytest.mark.skipif(
    bool(build.unavailable()) or not build.is_set(), reason=build.unavailable() or "needs build.py --env"
)

DTYPES = [torch.float32, torch.bfloat16]
# rows and columns of pixels that a tile's windows see, over those that are its own; 1 where it is alone
SHARED = {
    "stem_conv": (21 / 16, 38 / 32),
    "stem_wgrad": (21 / 16, 38 / 32),
    "stem_bias_act": (37 / 28, 38 / 28),
}


@pytest.fixture
def gpu() -> Iterator[ModuleType]:
    from emulation.cuda_on_cpu import cuda_on_cpu, module

    module().seed(0)
    with cuda_on_cpu():
        yield module()
    module().unwatch_all()
    module().count_banks(False)


class Tensors:
    """Every full tensor of the ops on images [n, 3, h, w], by ``filters``."""

    def __init__(self, shape: tuple[int, int, int], filters: int, dtype: torch.dtype) -> None:
        n, h, w = shape

        def activation(channels: int, *size: int) -> Tensor:
            return torch.rand(n, channels, *size).to(dtype, memory_format=torch.channels_last)

        self.x, self.weight = torch.rand(n, 3, h, w), torch.rand(filters, 3, 7, 7)
        self.y, self.dy = (activation(filters, (h + 1) // 2, (w + 1) // 2) for _ in range(2))
        self.z = activation(filters, (h + 3) // 4, (w + 3) // 4)
        self.pixels = torch.zeros(pixels_shape(n, h, w), dtype=dtype)
        self.stats, self.dweight = torch.rand(5, filters), torch.rand(filters, 3, 7, 7)


# op, how it is called on Tensors, what it reads and writes of them
CALLS = {
    "stem_conv": (
        lambda k, t: k.stem_conv(t.x, t.weight, None, None, 1e-5, t.pixels, t.y, t.stats),
        "x",
        "pixels y",
    ),
    "stem_bias_act": (lambda k, t: k.stem_bias_act(t.x, t.weight, None, None, None, True, t.z), "x", "z"),
    "stem_wgrad": (lambda k, t: k.stem_wgrad(t.dy, t.pixels, t.dweight), "dy pixels", ""),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_traffic(gpu, name, dtype):
    """Each byte moves once, but for the pixels that neighbouring tiles share, which are in the caches."""
    from fusedres.kernels import cuda

    call, reads, writes = CALLS[name]
    t = Tensors((1, 33, 66), 8, dtype)
    for tensor in ("x", "y", "z", "dy", "pixels"):
        gpu.watch(tensor, getattr(t, tensor).data_ptr(), getattr(t, tensor).nbytes)
    gpu.reset()
    call(cuda, t)
    for tensor, found in gpu.traffic().items():
        if tensor == "other":
            continue
        size = getattr(t, tensor).nbytes
        written = size if tensor in writes.split() else 0
        assert (found["written"], found["distinct_written"]) == (written, written), tensor
        assert found["distinct_read"] == (size if tensor in reads.split() else 0), tensor
        down, across = SHARED[name] if tensor in ("x", "pixels") else (1, 1)
        assert found["read"] <= size * down * across, (tensor, found["read"] / size)
    launches = {"stem_conv": 2, "stem_bias_act": 1, "stem_wgrad": 2}
    assert len(gpu.launches()) == launches[name]
    # what every chip has
    assert all(launch["shared_bytes"] <= 99 * 1024 for launch in gpu.launches())


# outside of every loop over tiles' products: filters laid out once a block, and samples of a whole tile
WAITS = ("store_shared(reinterpret_cast<uint4*>(to + k * kPitch", "store_shared(samples + ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_bank_waits(gpu, name, dtype):
    from fusedres.kernels import cuda

    gpu.count_banks(True)
    CALLS[name][0](cuda, Tensors((1, 16, 34), 64, dtype))
    counted = banks.by_place(gpu)
    assert any(place.startswith("stem") for place in counted)
    for place in banks.conflicts(gpu):
        file, line = place.split(":")
        text = (build.CUDA / file).read_text().splitlines()[int(line) - 1]
        assert any(wait in text for wait in WAITS), f"{place}: {text}"
