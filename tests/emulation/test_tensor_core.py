"""Tensor-core primitives in the emulation: products against plain ones, planted faults, bank conflicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulation import banks, build
from torch import Tensor

pytestmark = pytest.mark.skipif(
    bool(build.unavailable()) or not build.is_set(), reason=build.unavailable() or "needs build.py --env"
)

SEEDS = range(8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def module() -> ModuleType:
    source = build.HERE / "planted_tensor_core.cu"
    return build.load(build.build("_planted_tensor_core", [source], ["FUSEDRES_BIND_CUDA"]))


@pytest.fixture
def planted(module: ModuleType) -> Iterator[ModuleType]:
    module.seed(0)
    module.preempt(True)
    module.reset()
    yield module
    module.count_banks(False)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    depth = 64 // dtype.itemsize
    return torch.randn(16, depth).to(dtype), torch.randn(16, depth).to(dtype)


def run(module: ModuleType, name: str, a: Tensor, b: Tensor) -> Tensor:
    out = torch.full((16, 16), math.nan)
    module.product(name, a.data_ptr(), b.data_ptr(), out.data_ptr())
    return out


def rounded(t: Tensor) -> Tensor:
    """As the tensor cores see it: float32 with 10 bits behind the point, ties away from zero."""
    if t.dtype != torch.float32:
        return t.double()
    mantissa, exponent = torch.frexp(t.double())
    return torch.ldexp(torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent)


# values of 32 bits are not transposed by the instruction
@pytest.mark.parametrize(
    "dtype, transposed", [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in DTYPES[1:])]
)
def test_product(planted, dtype, transposed):
    a, b = operands(dtype)
    name = str(dtype).removeprefix("torch.") + " transposed" * transposed
    for seed in SEEDS:
        planted.seed(seed)
        out = run(planted, name, a, b.T.contiguous() if transposed else b)
        torch.testing.assert_close(out.double(), rounded(a) @ rounded(b).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no barrier", "shared memory that .* wrote with no barrier in between"),
        ("overwritten", "with no barrier in between"),
        ("half a warp", "waits in load_matrices"),
        ("misaligned", "names a row that isn't 16 aligned bytes of shared memory"),
        ("out of bounds", "names a row that isn't 16 aligned bytes of shared memory"),
        ("never awaited", "ended with copies on their way"),
    ],
)
def test_fault(planted, name, message):
    a, b = operands(torch.bfloat16)
    for seed in SEEDS:
        planted.seed(seed)
        with pytest.raises(RuntimeError, match=message):
            run(planted, name, a, b)


def test_copies_arrive_when_waited_for(planted):
    """Before, there is garbage, and at the end of the kernel they are still on their way."""
    a, b = operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match="ended with copies on their way"):
        run(planted, "no wait", a, b)


def test_bank_conflicts(planted):
    """Of 8 rows at the same place in their banks all but one wait; exchanged chunks have none."""
    a, b = operands(torch.bfloat16)
    planted.count_banks(True)
    run(planted, "bfloat16", a, b)
    counted = banks.by_place(planted)
    assert counted and all(place.startswith("planted_tensor_core.cu:") for place in counted)
    # two warps: of each, a copy of either operand, and two fragments in each of two steps
    assert sum(place["accesses"] for place in counted.values()) == 2 * (2 + 2 * 2)
    assert not any(place["conflicts"] for place in counted.values())
    planted.count_banks(True)
    run(planted, "in a row", a, b)
    # of two warps: two copies, a quarter of which writes two rows, and twice two fragments of 4 x 8 rows
    assert sum(banks.conflicts(planted).values()) == 2 * (2 * 4 * 1 + 2 * 2 * 4 * 7)
