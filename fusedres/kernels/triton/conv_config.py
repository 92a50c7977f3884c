"""Launch settings of the convolution kernels: what they are, which are valid, which is taken.

A convolution is a matrix product. A program works on a tile of BLOCK_M rows and BLOCK_N columns, BLOCK_K
values of the reduction a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
        programs_per_sm: programs that a multiprocessor shall hold at once.
        group_m: rows of tiles that are worked on together, so that they share operands in the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    group_m: int = 8

    @property
    def max_registers(self) -> int:
        threads = self.programs_per_sm * self.num_warps * THREADS_PER_WARP
        return min(MAX_REGISTERS, REGISTERS_PER_SM // threads)

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
    input channels. Gradient of the weight: input channels (of each tap), output positions, filters.
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
    # what goes back to shared memory after its prologue is loaded one stage less ahead
    "conv_fwd": Staged(a=1, b=1, vectors=2, written=(0, 0)),
    "conv_fwd_residual": Staged(a=2, b=1, vectors=4, written=(0, 0)),
    "conv_bias_act": Staged(a=1, b=1, vectors=0, written=(0, 0)),
    "conv_int8": Staged(a=1, b=1, vectors=0, written=(0, 0)),
    "conv_dgrad": Staged(a=2, b=1, vectors=4, written=(0, 0)),
    "conv_dgrad_fp32": Staged(a=2, b=1, vectors=4, written=(0, 0)),
    "conv_wgrad": Staged(a=1, b=2, vectors=0, written=(1, 1)),
    # all rows of a window at once. stem_conv: the weight, which stays, and the output on its way to other
    # threads; stem_wgrad_sync: the window in one piece
    "stem_conv": Staged(a=7, b=0, vectors=0, written=(2, 7)),
    "stem_conv_sync": Staged(a=7, b=0, vectors=0, written=(2, 7)),
    "stem_wgrad": Staged(a=1, b=7, vectors=0, written=(0, 0)),
    "stem_wgrad_sync": Staged(a=1, b=1, vectors=0, written=(0, 0)),
}

# in the order of preference: wide tiles first, narrow ones for few columns
_FORWARD = (
    ConvConfig(128, 128, 64, num_warps=8, num_stages=3, programs_per_sm=2),
    ConvConfig(128, 128, 64, num_warps=8, num_stages=3),
    ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
    ConvConfig(128, 64, 64, num_warps=8, num_stages=3, programs_per_sm=2),
    ConvConfig(128, 64, 64, num_warps=8, num_stages=3),
    ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
    # for autotune to try: fewer reads of the other operand, fewer programs at once
    ConvConfig(128, 256, 64, num_warps=8, num_stages=3),
    ConvConfig(256, 64, 32, num_warps=8, num_stages=3, programs_per_sm=2),
)
CONFIGS: dict[str, tuple[ConvConfig, ...]] = {
    "conv_fwd": _FORWARD,
    "conv_fwd_residual": (
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=2),
        ConvConfig(128, 256, 32, num_warps=8, num_stages=3),
    ),
    "conv_bias_act": _FORWARD,
    # twice the values in as many bytes; shallow ones for few channels
    "conv_int8": (
        ConvConfig(128, 128, 128, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 128, 128, num_warps=8, num_stages=3),
        ConvConfig(128, 128, 64, num_warps=8, num_stages=4),
        ConvConfig(128, 64, 128, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 64, 128, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 64, num_warps=8, num_stages=4),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=4),
        ConvConfig(128, 256, 128, num_warps=8, num_stages=3),
        ConvConfig(256, 64, 64, num_warps=8, num_stages=3, programs_per_sm=2),
    ),
    "conv_dgrad": (
        ConvConfig(64, 128, 64, num_warps=4, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 128, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
        ConvConfig(64, 64, 32, num_warps=4, num_stages=3),
    ),
    # four bytes of two tensors and a product would be more than a thread's registers in wider tiles
    "conv_dgrad_fp32": (
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
        ConvConfig(64, 64, 32, num_warps=4, num_stages=3),
    ),
    "conv_wgrad": (
        ConvConfig(128, 128, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(64, 128, 64, num_warps=8, num_stages=3),
        ConvConfig(64, 128, 32, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 64, num_warps=8, num_stages=3),
        ConvConfig(128, 64, 32, num_warps=8, num_stages=3),
        ConvConfig(64, 64, 64, num_warps=4, num_stages=3),
        ConvConfig(64, 64, 64, num_warps=8, num_stages=3, programs_per_sm=2),
        ConvConfig(64, 64, 32, num_warps=4, num_stages=3),
    ),
    # two programs fit into a multiprocessor; _sync: operands of a product come out of registers
    "stem_conv": (ConvConfig(64, 64, 32, num_warps=4, num_stages=2),),
    "stem_conv_sync": (
        ConvConfig(32, 64, 32, num_warps=4, num_stages=2),
        ConvConfig(32, 32, 32, num_warps=4, num_stages=2),
    ),
    "stem_wgrad": (ConvConfig(64, 32, 64, num_warps=4, num_stages=3),),
    "stem_wgrad_sync": (
        ConvConfig(64, 256, 64, num_warps=8, num_stages=3),
        ConvConfig(64, 256, 64, num_warps=8, num_stages=2),
        ConvConfig(32, 256, 32, num_warps=8, num_stages=2),
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
    low, narrow, shallow = (
        min(side) for side in zip(*((c.block_m, c.block_n, c.block_k) for c in CONFIGS[kernel]), strict=True)
    )
    return (
        arch >= MIN_ARCH
        # a multiprocessor has 1 KiB more than a program can have, and keeps 1 KiB for every program
        and config.programs_per_sm * (shared_bytes(kernel, config, problem) + 1024)
        <= 1024 * (SHARED_KIB.get(arch, OTHER_SHARED_KIB) + 1)
        # wgmma reads both operands from shared memory; elsewhere they need registers beside the accumulators
        and (
            (config.programs_per_sm == 1 and config.block_m * config.block_n <= 128 * 128)
            or (arch == (9, 0) and problem.itemsize <= 2)
        )
        # no more than half of a side idle, unless shorter ones can't be had
        and (config.block_m == low or 2 * problem.rows > config.block_m)
        and (config.block_n == narrow or 2 * problem.columns > config.block_n)
        and (config.block_k == shallow or 2 * problem.inner > config.block_k)
        # four bytes take twice the registers in flight
        and (problem.itemsize < 4 or config.block_k <= 32)
    )


# found better than the first valid one; and who picks instead, in a trial (``settings``)
PREFERRED: dict[tuple[str, ConvProblem], ConvConfig] = {}
chooser: Callable[[str, ConvProblem, list[ConvConfig]], ConvConfig] | None = None


@functools.lru_cache(maxsize=4096)
def _first(kernel: str, problem: ConvProblem, arch: tuple[int, int]) -> ConvConfig:
    return first_valid(kernel, CONFIGS[kernel], functools.partial(is_valid, kernel), problem, arch)


def select(kernel: str, problem: ConvProblem, arch: tuple[int, int]) -> ConvConfig:
    """The config of ``kernel`` that is preferred, else its first valid one."""
    if chooser is not None:
        return chooser(kernel, problem, [c for c in CONFIGS[kernel] if is_valid(kernel, c, problem, arch)])
    preferred = PREFERRED.get((kernel, problem))
    if preferred is not None and is_valid(kernel, preferred, problem, arch):
        return preferred
    return _first(kernel, problem, arch)
