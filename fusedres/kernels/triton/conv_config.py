"""Launch settings of the convolution kernels: what they are, which are valid, which is taken.

A convolution is a matrix product. A program works on a tile of BLOCK_M rows and BLOCK_N columns, BLOCK_K
values of the reduction a step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from fusedres.kernels.triton.config import MIN_ARCH, REGISTERS_PER_SM, THREADS_PER_WARP, first_valid

# shared memory that one program can have, in KiB, by compute capability; 99 on consumer chips
SHARED_KIB = {(8, 0): 163, (9, 0): 227, (10, 0): 227}
OTHER_SHARED_KIB = 99
MAX_REGISTERS = 255


@dataclass(frozen=True)
class ConvConfig:
    """One way to launch a convolution.

    Args:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: values of one step of the reduction.
        num_warps: warps of a program.
        num_stages: steps whose loads are under way at once.
        group_m: rows of tiles that are worked on together, so that they share operands in the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    @property
    def max_registers(self) -> int:
        return min(MAX_REGISTERS, REGISTERS_PER_SM // (self.num_warps * THREADS_PER_WARP))

    @property
    def keywords(self) -> dict[str, int]:
        """What a kernel is launched with."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


class ConvProblem(NamedTuple):
    """The matrix product of a convolution: [rows, taps * inner] x [taps * inner, columns].

    Forward: output positions, input channels, filters. Gradient of the input: input positions, filters,
    input channels. Gradient of the weight: filters, output positions, input channels (of each tap).
    """

    rows: int
    inner: int
    columns: int
    taps: int
    itemsize: int


class Staged(NamedTuple):
    """What a step of a kernel's loop keeps in shared memory, at most.

    Args:
        a: tensors of [BLOCK_M, BLOCK_K] that are loaded.
        b: tensors of [BLOCK_N, BLOCK_K] that are loaded.
        vectors: float32 vectors of BLOCK_K values that are loaded.
        written: tiles [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K] that go back to shared memory after their
            prologue.
    """

    a: int
    b: int
    vectors: int
    written: tuple[int, int]


STAGED = {
    "conv_fwd": Staged(a=1, b=1, vectors=2, written=(1, 0)),
}

# in the order of preference: wide tiles first, narrow ones for few columns
CONFIGS: dict[str, tuple[ConvConfig, ...]] = {
    "conv_fwd": (
        ConvConfig(128, 128, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
    ),
}


def shared_bytes(kernel: str, config: ConvConfig, problem: ConvProblem) -> int:
    """Shared memory that a program of ``kernel`` needs, at most."""
    of_a, of_b = config.block_m * config.block_k, config.block_n * config.block_k
    staged = STAGED[kernel]
    loaded = (staged.a * of_a + staged.b * of_b) * problem.itemsize + staged.vectors * config.block_k * 4
    written = (staged.written[0] * of_a + staged.written[1] * of_b) * problem.itemsize
    return config.num_stages * loaded + written


def is_valid(kernel: str, config: ConvConfig, problem: ConvProblem, arch: tuple[int, int]) -> bool:
    """Whether ``config`` can run ``problem`` on a GPU of compute capability ``arch``, and makes sense."""
    return (
        arch >= MIN_ARCH
        and shared_bytes(kernel, config, problem) <= 1024 * SHARED_KIB.get(arch, OTHER_SHARED_KIB)
        # no more than half of the tile idle, unless narrower ones can't be had
        and (config.block_n <= 64 or 2 * problem.columns > config.block_n)
        # four bytes take twice the registers in flight
        and (problem.itemsize < 4 or config.block_k <= 32)
    )


def select(kernel: str, problem: ConvProblem, arch: tuple[int, int]) -> ConvConfig:
    """The first valid config of ``kernel``."""
    return first_valid(kernel, CONFIGS[kernel], functools.partial(is_valid, kernel), problem, arch)
