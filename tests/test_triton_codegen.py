"""What the compiler makes of the Triton kernels, for every architecture and with no GPU.

A config that spills registers, overruns shared memory or splits its accesses is right and slow, which
no numeric test sees. ``-m codegen`` compiles everything that is shipped, the rest a part of it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from triton_code import ITEMSIZES, SHARED_KIB, compile_for, usage

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fusedres.kernels.triton import config  # noqa: E402
from fusedres.kernels.triton.bn_act import bn_act_fwd_kernel  # noqa: E402
from fusedres.kernels.triton.bn_act_backward import (  # noqa: E402
    bn_act_bwd_apply_kernel,
    bn_act_bwd_finalize_kernel,
    bn_act_bwd_partial_kernel,
)
from fusedres.kernels.triton.bn_stats import (  # noqa: E402
    bn_running_stats_kernel,
    bn_stats_finalize_kernel,
    bn_stats_partial_kernel,
    bn_update_running_kernel,
)
from fusedres.kernels.triton.config import BnConfig, BnProblem  # noqa: E402

ACTIVATIONS = {"x", "z", "residual", "grad", "du", "dx", "dresidual"}
WRITTEN = {
    "bn_act_fwd_kernel": {"z"},
    "bn_act_bwd_partial_kernel": {"du"},
    "bn_act_bwd_apply_kernel": {"dx", "dresidual"},
}
INTEGERS = {"rows", "channels", "channel_groups", "steps", "programs", "rows_per_program"}
FLOATS = {"eps", "momentum", "unbias"}


class Kernel(NamedTuple):
    """A kernel under one set of configs.

    ``variants`` are the constants that select one, None for a tensor that isn't given; those of a ResNet's
    training step come first, and are ``typical`` in number.
    """

    function: Any
    configs: tuple[BnConfig, ...]
    variants: list[dict[str, Any]]
    typical: int = 1


PLAIN_RESIDUAL: dict[str, Any] = {"residual_stats": None}
NO_RESIDUAL = PLAIN_RESIDUAL | {"residual": None}
NO_RESIDUAL_SUMS = {"residual_stats": None, "residual_sums": None}
NO_BRANCH = NO_RESIDUAL | NO_RESIDUAL_SUMS | {"dresidual": None}
NO_Z: dict[str, Any] = {"z": None, "du": None}

KERNELS = [
    Kernel(
        bn_act_fwd_kernel,
        config.CONFIGS["bn_act"],
        [
            {"RELU": True} | PLAIN_RESIDUAL,
            {"RELU": True} | NO_RESIDUAL,
            {"RELU": False} | PLAIN_RESIDUAL,
            {"RELU": False} | NO_RESIDUAL,
        ],
    ),
    Kernel(bn_act_fwd_kernel, config.CONFIGS["bn_act_branch"], [{"RELU": True}, {"RELU": False}]),
    Kernel(bn_stats_partial_kernel, config.CONFIGS["bn_stats"], [{}]),
    Kernel(bn_stats_finalize_kernel, (config.FINALIZE,), [{}, {"weight": None, "bias": None}]),
    Kernel(bn_running_stats_kernel, (config.PER_CHANNEL,), [{}, {"weight": None, "bias": None}]),
    Kernel(bn_update_running_kernel, (config.PER_CHANNEL,), [{}]),
    Kernel(
        bn_act_bwd_partial_kernel,
        config.CONFIGS["bn_act_backward_reduce"],
        [
            {"RELU": True} | NO_RESIDUAL,
            {"RELU": True} | NO_RESIDUAL | NO_Z,
            {"RELU": False} | NO_RESIDUAL | NO_Z,
        ],
        typical=2,
    ),
    Kernel(
        bn_act_bwd_partial_kernel,
        config.CONFIGS["bn_act_backward_reduce_branch"],
        [{"RELU": True}, {"RELU": False} | NO_Z],
    ),
    Kernel(bn_act_bwd_finalize_kernel, (config.FINALIZE,), [NO_RESIDUAL_SUMS, {}], typical=2),
    Kernel(
        bn_act_bwd_apply_kernel,
        config.CONFIGS["bn_act_backward_apply"],
        [
            {"RELU": True} | NO_BRANCH,
            {"RELU": False} | NO_BRANCH,
            {"RELU": True, "sums": None} | NO_BRANCH,
            {"RELU": False, "sums": None} | NO_BRANCH,
        ],
    ),
    Kernel(
        bn_act_bwd_apply_kernel,
        config.CONFIGS["bn_act_backward_apply_branch"],
        [
            {"RELU": False},
            {"RELU": False, "sums": None},
            {"RELU": False, "residual_sums": None},
            {"RELU": False, "sums": None, "residual_sums": None},
        ],
    ),
]


class Case(NamedTuple):
    kernel: Any
    config: BnConfig
    variant: dict[str, Any]
    dtype: str
    arch: int
    vec: int = config.VEC

    def __str__(self) -> str:
        flags = ",".join(f"{k}={v}" for k, v in self.variant.items())
        tile = f"{self.config.block_m}x{self.config.block_c}"
        return f"{self.kernel.__name__}-{flags}-{tile}-{self.dtype}-vec{self.vec}-sm{self.arch}"

    @property
    def streams(self) -> bool:
        """Works on the activation, rather than on a few values per channel."""
        return "VEC" in self.kernel.arg_names

    @property
    def valid(self) -> bool:
        problem = BnProblem(1_000_000, self.config.block_c, ITEMSIZES[self.dtype])
        return not self.streams or config.is_valid(self.config, problem, (self.arch // 10, self.arch % 10))


class Compiled(NamedTuple):
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


def compile_case(case: Case, directory: Path) -> Compiled:
    """Compile as the JIT would for 16-byte aligned tensors."""
    names = case.kernel.arg_names
    tile = {"VEC": case.vec, "BLOCK_M": case.config.block_m, "BLOCK_C": case.config.block_c}
    constants = case.variant | {k: v for k, v in tile.items() if k in names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        if name in FLOATS:
            return "fp32"
        return "*" + (case.dtype if name in ACTIVATIONS else "fp32")

    signature = {name: kind(name) for name in names}
    options = {"num_warps": case.config.num_warps, "maxnreg": case.config.max_registers(case.vec)}
    compiled = compile_for(case.arch, case.kernel, signature, constants, options)
    found = usage(compiled, directory)
    return Compiled(
        *(found[k] for k in ("REG", "STACK", "LOCAL")), compiled.metadata.shared, compiled.asm["ptx"]
    )


def check(case: Case, compiled: Compiled) -> None:
    assert compiled.stack == compiled.local == 0, f"spills: {compiled.stack} bytes of stack"
    assert compiled.registers <= (case.config.max_registers(case.vec) or 255), (
        f"{compiled.registers} registers"
    )
    assert compiled.shared <= SHARED_KIB[case.arch] * 1024, f"{compiled.shared} bytes of shared memory"
    if not case.streams or case.vec < config.VEC:
        return
    accesses = re.findall(r"\b(ld|st)\.global(\S*)", compiled.ptx)
    narrow = [width for kind, width in accesses if kind == "ld" and ".v4.b32" not in width]
    assert not narrow, f"narrow loads: {narrow}"
    written = len(WRITTEN.get(case.kernel.__name__, set()) - case.variant.keys())
    tile_bytes = case.config.block_m * case.config.block_c * ITEMSIZES[case.dtype]
    wide = sum(kind == "st" and ".v4.b32" in width for kind, width in accesses)
    if written:
        expected = written * tile_bytes // (case.config.threads * config.ACCESS_BYTES)
        assert wide == expected, f"{wide} wide stores"


def shipped() -> Iterator[tuple[Case, bool]]:
    """Everything that may be launched, and whether it is typical.

    That is the first config of every kernel in a training step, on every architecture; fp32 on one.
    """
    for kernel in KERNELS:
        dtypes = list(ITEMSIZES) if "VEC" in kernel.function.arg_names else ["fp32"]
        for c, variant, dtype, arch in itertools.product(kernel.configs, kernel.variants, dtypes, SHARED_KIB):
            case = Case(kernel.function, c, variant, dtype, arch)
            trained = c == kernel.configs[0] and variant in kernel.variants[: kernel.typical]
            in_dtype = dtype == "bf16" or (dtype == "fp32" and (arch == 90 or not case.streams))
            yield case, trained and in_dtype
            if arch == 90 and dtype == "bf16":
                yield case._replace(vec=1), False


SHIPPED = [(case, typical) for case, typical in shipped() if case.valid]


@pytest.mark.parametrize("case", [case for case, typical in SHIPPED if typical], ids=str)
def test_typical(case: Case, tmp_path: Path) -> None:
    check(case, compile_case(case, tmp_path))


@pytest.mark.codegen
@pytest.mark.parametrize("case", [case for case, typical in SHIPPED if not typical], ids=str)
def test_everything_shipped(case: Case, tmp_path: Path) -> None:
    check(case, compile_case(case, tmp_path))


@pytest.mark.parametrize(
    ("sums", "unread", "read"), [("sums", "x", "residual"), ("residual_sums", "residual", "x")]
)
def test_fixed_statistics_need_no_activation(sums: str, unread: str, read: str, tmp_path: Path) -> None:
    """A gradient behind a frozen batch norm takes no load of what went into it."""
    tile = config.CONFIGS["bn_act_backward_apply_branch"][0]
    case = Case(bn_act_bwd_apply_kernel, tile, {"RELU": False, sums: None}, "bf16", 90)
    ptx = compile_case(case, tmp_path).ptx
    given = [name for name in case.kernel.arg_names if name not in case.variant]
    assert f"_param_{given.index(read)}]" in ptx
    assert f"_param_{given.index(unread)}]" not in ptx


@pytest.mark.parametrize(
    ("tile", "vec", "complaint"),
    [(BnConfig(256, 64, 4), 8, "spills"), (BnConfig(32, 64, 4), 2, "narrow loads")],
)
def test_a_bad_config_is_caught(tile: BnConfig, vec: int, complaint: str, tmp_path: Path) -> None:
    compiled = compile_case(Case(bn_stats_partial_kernel, tile, {}, "bf16", 90, vec), tmp_path)
    with pytest.raises(AssertionError, match=complaint):
        check(Case(bn_stats_partial_kernel, tile, {}, "bf16", 90), compiled)


@pytest.mark.parametrize("channels", [1, 3, 8, 20, 64, 130, 192, 2048, 100_000])
@pytest.mark.parametrize("rows", [1, 49, 12_544, 3_211_264, 2**31 + 5])
@pytest.mark.parametrize("kernel", config.CONFIGS)
def test_every_row_has_one_program(kernel: str, rows: int, channels: int) -> None:
    launch = config.divide(kernel, rows, channels, 2, torch.device("cpu"))
    share = launch.steps * launch.config.block_m
    assert (launch.programs - 1) * share < rows <= launch.programs * share
    assert launch.grid == (launch.programs * -(-channels // launch.config.block_c),)
    assert launch.channel_groups * launch.keywords["VEC"] == channels
    if launch.config.programs_per_sm is None:
        assert launch.steps == 1


@pytest.mark.parametrize(
    ("bad", "problem", "arch"),
    [
        (BnConfig(64, 64, 4), BnProblem(1000, 64, 2), (7, 5)),
        (BnConfig(64, 64, 4, programs_per_sm=16), BnProblem(1000, 64, 2), (8, 6)),
        (BnConfig(8, 64, 4), BnProblem(1000, 64, 2), (9, 0)),
        (BnConfig(64, 64, 4), BnProblem(1000, 3, 2), (9, 0)),
        (BnConfig(64, 64, 4), BnProblem(1, 2**26, 2), (9, 0)),
    ],
    ids=[
        "old GPU",
        "programs that don't fit together",
        "less than an access a thread",
        "idle lanes",
        "int32",
    ],
)
def test_is_valid_refuses(bad: BnConfig, problem: BnProblem, arch: tuple[int, int]) -> None:
    assert not config.is_valid(bad, problem, arch)
