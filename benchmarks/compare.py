"""The sides of a comparison: checked first, then timed in turns, with what belongs beside each figure."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import roofline
import torch
from torch import nn

from fusedres import ops
from fusedres.cli import machine
from fusedres.cli.bench import breakdown, check, measure
from fusedres.cli.bench.check import Observed
from fusedres.cli.bench.workload import Step
from fusedres.plan.traffic import Pass

FUSED, EAGER, NCHW, COMPILE = SIDES = ("fused", "eager", "eager_nchw", "compile")
LAYOUTS = {name: torch.contiguous_format if name == NCHW else torch.channels_last for name in SIDES}
BITS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
WARMUP = 1


@dataclass(frozen=True)
class Side:
    """One way to compute a case.

    Args:
        step: what is timed.
        observe: outputs and gradients of one step.
    """

    step: Step
    observe: Callable[[], tuple[Observed, Observed]]


@dataclass(frozen=True)
class Case:
    """The same computed in several ways.

    Args:
        sides: makers, by names of SIDES; "eager" is among them.
        expected: outputs and gradients in a wider type.
        shape: of the input.
        dtype: of activations.
        work: the passes that the op, block or net needs where everything is fused that can be.
        op: whose implementation "fused" stands for.
    """

    sides: Mapping[str, Callable[[], Side]]
    expected: tuple[Observed, Observed]
    shape: Sequence[int]
    dtype: torch.dtype
    work: Sequence[Pass]
    op: str = "bn_act"


@dataclass(frozen=True)
class Figures:
    """Of one side: seconds of every round, and facts; or why there are none."""

    seconds: Sequence[float] = ()
    facts: Mapping[str, Any] | None = None
    failure: Exception | None = None


def compiled(function: Callable[..., Any]) -> Any:
    """torch.compile of a function or module, for shapes that have been seen by nobody before."""
    torch.compiler.reset()  # or after a few shapes it gives up, and runs eagerly without a word
    return torch.compile(function, dynamic=False)


def in_layout(module: nn.Module, side: str) -> nn.Module:
    """A copy for a side."""
    module = copy.deepcopy(module).to(memory_format=LAYOUTS[side])
    return compiled(module) if side == COMPILE else module  # type: ignore[no-any-return]


def figures(case: Case, rounds: int, device: torch.device) -> dict[str, Figures]:
    """Every side checked against ``case.expected``, and those that pass timed in turns."""
    found, failures = {}, {}
    errors: dict[str, check.Errors] = {}
    for name in sorted(case.sides, key=lambda name: name != EAGER):
        try:
            side = case.sides[name]()
            errors[name] = check.errors(side.observe(), case.expected)
        except Exception as failure:  # a compiler that isn't there is its own side's alone
            failures[name] = failure
            continue
        wrong = check.failure(errors[name], errors[EAGER], case.dtype)
        if wrong is None:
            found[name] = side
        else:
            failures[name] = AssertionError(f"not timed, the check failed: {wrong}")
    measure.release_free_memory(device)
    steps = {name: found[name].step for name in case.sides if name in found}
    if device.type == "cuda":
        samples = measure.interleave(steps, rounds, WARMUP, device, "")
    else:
        samples = measure.take_turns(steps, rounds, WARMUP, "")
    medians = {name: statistics.median(of_side.ms) for name, of_side in samples.items()}
    measured = {name: Figures(failure=failure) for name, failure in failures.items()}
    for name, of_side in samples.items():
        facts = _facts(case, name, steps[name], medians[name], device)
        facts |= {"ratio_to_eager": medians[EAGER] / medians[name], "minor_faults": of_side.median_faults}
        facts |= {"error": max(errors[name].worst_output, errors[name].worst_gradient or 0.0)}
        measured[name] = Figures([ms / 1e3 for ms in of_side.ms], facts)
    return measured


def _facts(case: Case, name: str, step: Step, ms: float, device: torch.device) -> dict[str, Any]:
    limits = ceilings(case.dtype)
    floor = sum(work.seconds(limits["bandwidth"], limits["peak"]) for work in case.work)
    facts: dict[str, Any] = {
        "implementation": name,
        "dtype": BITS[case.dtype],
        "layout": "nchw" if name == NCHW else "channels_last",
        "shape": list(case.shape),
        "bytes": sum(work.bytes for work in case.work),
        "flop": sum(work.flop for work in case.work),
        "floor_ms": 1e3 * floor,
        "share_of_roofline": 1e3 * floor / ms,
        "ceilings": limits,
        "peak_bytes": measure.peak_bytes(step, device),
        "versions": machine.versions(),
        "device": machine.device_name(device),
        "threads": torch.get_num_threads(),
    }
    if name == FUSED:
        facts["served_by"] = ops.choice(case.op, device, case.dtype, ops.forced_backend()).implementation
        facts["share_of_time_in_own_kernels"] = breakdown.of(step, device).own_share
    return facts


@functools.cache
def ceilings(dtype: torch.dtype) -> dict[str, Any]:
    """This machine's bandwidth and arithmetic, measured once."""
    return roofline.measured(dtype)
