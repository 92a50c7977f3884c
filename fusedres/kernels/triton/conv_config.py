"""Launch settings of the convolution kernels: what they are, which are valid, which is taken.

A convolution is a matrix product [M, K] = [M, taps * C] x [taps * C, K]: M output positions, C channels in, K
filters. A program works on a tile of BLOCK_M positions and BLOCK_N filters, BLOCK_K channels a step.
"""

from __future__ import annotations

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
        block_m: output positions of a tile.
        block_n: filters of a tile.
        block_k: channels of one step of the reduction.
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
    """The matrix product of a convolution."""

    rows: int
    channels: int
    filters: int
    taps: int
    itemsize: int


# in the order of preference: wide tiles first, narrow ones for few filters
CONFIGS: dict[str, tuple[ConvConfig, ...]] = {
    "conv_fwd": (
        ConvConfig(128, 128, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
    ),
}


def shared_bytes(config: ConvConfig, problem: ConvProblem) -> int:
    """Shared memory that a program needs, at most: the operands' stages, and one more of the positions'."""
    of_a, of_b = config.block_m * config.block_k, config.block_n * config.block_k
    vectors = 2 * config.block_k * 4 * config.num_stages
    return (config.num_stages * (of_a + of_b) + of_a) * problem.itemsize + vectors


def is_valid(config: ConvConfig, problem: ConvProblem, arch: tuple[int, int]) -> bool:
    """Whether ``config`` can run ``problem`` on a GPU of compute capability ``arch``, and makes sense."""
    return (
        arch >= MIN_ARCH
        and shared_bytes(config, problem) <= 1024 * SHARED_KIB.get(arch, OTHER_SHARED_KIB)
        # no more than half of the tile idle, unless narrower ones can't be had
        and (config.block_n <= 64 or 2 * problem.filters > config.block_n)
        # four bytes take twice the registers in flight
        and (problem.itemsize < 4 or config.block_k <= 32)
    )


def select(kernel: str, problem: ConvProblem, arch: tuple[int, int]) -> ConvConfig:
    """The first valid config of ``kernel``."""
    return first_valid(kernel, CONFIGS[kernel], is_valid, problem, arch)
