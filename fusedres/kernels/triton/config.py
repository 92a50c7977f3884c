"""Launch settings of the batch-norm kernels: what they are, which are valid, which is taken.

The activation is a row-major matrix [M, C], M = N*H*W. A program works on tiles of BLOCK_M rows and
BLOCK_C channels. Nothing here depends on anything but shape, dtype and device, so a shape is always
summed in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

C = TypeVar("C")
P = TypeVar("P")

# the widest global access: a thread should move this much at a time
ACCESS_BYTES = 16
# channels of one access of a two-byte dtype: the kernels are built for multiples of it; of one byte
VEC = 8
INT8_VEC = 16
MIN_ARCH = (8, 0)
THREADS_PER_WARP = 32
REGISTERS_PER_SM = 65536
# resident threads of a multiprocessor, by compute capability; consumer chips hold fewer
THREADS_PER_SM = {(8, 0): 2048, (9, 0): 2048, (10, 0): 2048}
OTHER_THREADS_PER_SM = 1536


@dataclass(frozen=True)
class BnConfig:
    """One way to launch a kernel.

    Args:
        block_m: rows of a tile.
        block_c: channels of a tile.
        num_warps: warps of a program.
        programs_per_sm: programs that stay on a multiprocessor and each sum over many tiles;
            None where a program has one tile.
    """

    block_m: int
    block_c: int
    num_warps: int
    programs_per_sm: int | None = None

    @property
    def threads(self) -> int:
        return self.num_warps * THREADS_PER_WARP

    @property
    def keywords(self) -> dict[str, int]:
        """What a kernel is launched with."""
        return {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c, "num_warps": self.num_warps}

    def column_blocks(self, channels: int) -> int:
        return math.ceil(channels / self.block_c)

    def max_registers(self, vec: int) -> int | None:
        """Registers of a thread (allotted in eights) with which all programs of a multiprocessor fit.

        None, the compiler's choice, where a program has one tile, and where channels can't be taken eight
        at a time: an address for every element needs more.
        """
        if self.programs_per_sm is None or vec < VEC:
            return None
        return REGISTERS_PER_SM // (self.threads * self.programs_per_sm) // 8 * 8


class BnProblem(NamedTuple):
    """The activation that a kernel is launched on."""

    rows: int
    channels: int
    itemsize: int


class Launch(NamedTuple):
    """A config applied to an activation [rows, channels], whose rows ``programs`` share."""

    config: BnConfig
    rows: int
    channel_groups: int  # of VEC channels
    steps: int  # tiles of a program
    programs: int  # for each block of channels
    grid: tuple[int]
    keywords: dict[str, int | None]


# 128-byte rows of bf16 keep every sector of a line in one program; taller tiles for fewer channels
_TILES = ((64, 64), (128, 32), (256, 16), (512, 8))
_HALF_TILES = tuple((m // 2, c) for m, c in _TILES)
_STREAMING = tuple(BnConfig(m, c, num_warps=4) for m, c in _TILES)
# half the tile: a thread holds twice the tensors and the per-channel vectors
_STREAMING_BRANCH = tuple(BnConfig(m, c, num_warps=4) for m, c in _HALF_TILES)
# half the tile: a program also holds two float32 accumulators for every element of it
_STATISTICS = tuple(BnConfig(m, c, num_warps=4, programs_per_sm=6) for m, c in _HALF_TILES)
# likewise, and it reads two or three tensors, so fewer programs keep memory busy
_REDUCTION = tuple(BnConfig(m, c, num_warps=4, programs_per_sm=4) for m, c in _HALF_TILES)
# a third accumulator and a fourth tensor
_REDUCTION_BRANCH = tuple(BnConfig(m, c, num_warps=4, programs_per_sm=3) for m, c in _HALF_TILES)

# in the order of preference, by kernel; _branch: with a residual that has statistics of its own
CONFIGS: dict[str, tuple[BnConfig, ...]] = {
    "bn_stats": _STATISTICS,
    "bn_act": _STREAMING,
    "bn_act_branch": _STREAMING_BRANCH,
    "bn_act_backward_reduce": _REDUCTION,
    "bn_act_backward_reduce_branch": _REDUCTION_BRANCH,
    "bn_act_backward_apply": _STREAMING,
    "bn_act_backward_apply_branch": _STREAMING_BRANCH,
}
# second pass over the partial sums of all programs: 8 channels are a 32-byte sector of float32
FINALIZE = BnConfig(block_m=128, block_c=8, num_warps=4)
# the same over many programs: a column of sums is one multiprocessor's, which needs more of them under way
FINALIZE_MANY = BnConfig(block_m=512, block_c=8, num_warps=16)
# vectors of one value per channel
PER_CHANNEL = BnConfig(block_m=1, block_c=128, num_warps=4)


def finalize(programs: int) -> BnConfig:
    """How the partial sums of ``programs`` programs become one."""
    return FINALIZE if programs <= FINALIZE_MANY.block_m else FINALIZE_MANY


def is_valid(config: BnConfig, problem: BnProblem, arch: tuple[int, int]) -> bool:
    """Whether ``config`` can run ``problem`` on a GPU of compute capability ``arch``, and makes sense."""
    resident = config.threads * (config.programs_per_sm or 1)
    per_access = ACCESS_BYTES // problem.itemsize
    padded = config.column_blocks(problem.channels) * config.block_c
    return (
        arch >= MIN_ARCH
        and resident <= THREADS_PER_SM.get(arch, OTHER_THREADS_PER_SM)
        and config.block_m * config.block_c >= config.threads * per_access
        # offsets inside a tile are int32
        and config.block_m * padded < 2**31
        # no more than a quarter of the lanes idle, unless narrower tiles can't be had
        and (config.block_c <= VEC or 4 * (padded - problem.channels) <= padded)
    )


@functools.cache
def _facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; the interpreter's CPU is given small ones."""
    if device.type != "cuda":
        return MIN_ARCH, 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def arch_of(device: torch.device) -> tuple[int, int]:
    """Compute capability."""
    return _facts(device)[0]


def first_valid(
    kernel: str,
    configs: Sequence[C],
    valid: Callable[[C, P, tuple[int, int]], bool],
    problem: P,
    arch: tuple[int, int],
) -> C:
    """The first of ``configs`` that can run ``problem``.

    Raises:
        RuntimeError: there is none.
    """
    for config in configs:
        if valid(config, problem, arch):
            return config
    raise RuntimeError(f"no launch setting of {kernel} fits {problem} on compute capability {arch}")


def select(kernel: str, problem: BnProblem, arch: tuple[int, int]) -> BnConfig:
    """The first valid config of ``kernel``."""
    return first_valid(kernel, CONFIGS[kernel], is_valid, problem, arch)


@functools.lru_cache(maxsize=4096)
def divide(kernel: str, rows: int, channels: int, itemsize: int, device: torch.device) -> Launch:
    """How ``kernel`` runs on an activation of [rows, channels] on ``device``."""
    arch, multiprocessors = _facts(device)
    config = select(kernel, BnProblem(rows, channels, itemsize), arch)
    column_blocks = config.column_blocks(channels)
    tiles = math.ceil(rows / config.block_m)
    if config.programs_per_sm is None:
        steps = 1
    else:
        steps = math.ceil(tiles / max(1, multiprocessors * config.programs_per_sm // column_blocks))
    programs = math.ceil(tiles / steps)
    vec = math.gcd(channels, VEC)
    keywords = {"VEC": vec, "maxnreg": config.max_registers(vec), **config.keywords}
    grid = (programs * column_blocks,)
    return Launch(config, rows, channels // vec, steps, programs, grid, keywords)


def launch(kernel: str, x: Tensor, residual_stats: Tensor | None = None) -> Launch:
    """How ``kernel`` runs on activations like ``x``."""
    channels = x.shape[1]
    name = kernel if residual_stats is None else f"{kernel}_branch"
    return divide(name, x.numel() // channels, channels, x.element_size(), x.device)
