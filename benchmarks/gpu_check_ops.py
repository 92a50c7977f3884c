"""The parts that measure kernels: bytes over time, against the bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_check_cases import Case, groups
from gpu_check_run import Check, Record
from torch import Tensor

import fusedres
from fusedres import kernels
from fusedres import ops as registered

TARGET = 0.85  # of the copy bandwidth
IMPLEMENTATIONS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
ROUNDS, WARMUP = 20, 5
_LEAST_FLUSH = 256 << 20  # bytes
_QUEUE_CYCLES = 1_000_000  # about half a millisecond
_LAUNCHES = 1000
_ENOUGH = 5.0  # seconds, for a group of cases

# gates: a value may be off by one rounding of its dtype, few may be off by more (where a sum in another
# order falls on the other side of a rounding, and then through a ReLU)
_ABSOLUTE = 1e-5
_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_FEW = 1e-5
_FEW_PLACES = 1e-3  # of a maximum, where two values are next to equal; of levels, next to a tie
_OF_A_SUM = 1e-4  # of the largest in its row
_SAME_THING = 0.1  # ATen, which rounds in between, in the Euclidean norm


class Timer:
    """Median milliseconds of a call: on a GPU between two events, with a cold L2 cache."""

    def __init__(self, check: Check) -> None:
        self.gpu = check.device == "cuda"
        self.rounds, self.warmup = (3, 1) if check.tiny else (ROUNDS, WARMUP)
        if self.gpu:
            l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
            self.flush = torch.empty(max(_LEAST_FLUSH, 4 * l2), dtype=torch.uint8, device="cuda")

    def ms(self, call: Callable[[], object]) -> float:
        for _ in range(self.warmup):
            call()
        return statistics.median(self._on_gpu(call) if self.gpu else self._on_cpu(call))

    def _on_gpu(self, call: Callable[[], object]) -> list[float]:
        pairs = []
        for _ in range(self.rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(_QUEUE_CYCLES)  # meanwhile the launches below are queued, or they'd be timed
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def _on_cpu(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


def copy_gbps(check: Check, timer: Timer) -> tuple[float, int]:
    """GB/s, read and written, of ``copy_``, and the bytes of the tensor."""
    size = 16 << 20 if check.tiny else 1 << 30
    source = torch.zeros(size, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    return 2e-6 * size / timer.ms(lambda: target.copy_(source)), size


def copy(check: Check) -> None:
    """The bandwidth that kernels are held against, and what a launch costs."""
    timer = Timer(check)
    gbps, size = copy_gbps(check, timer)
    check.record("copy", gbps=gbps, tensor_bytes=size)
    one = torch.zeros(1, device=check.device)
    check.record("one-value kernel", ms=timer.ms(one.zero_))
    check.record("launch", implementation="aten", op="zero_", host_us=_host_us(one.zero_, check))
    mean, var = torch.zeros(64, device=check.device), torch.ones(64, device=check.device)
    for name in _available(check):
        with fusedres.backend(name):
            us = _host_us(lambda: torch.ops.fusedres.bn_running_stats(mean, var, None, None, 1e-5), check)
        check.record("launch", implementation=name, op="bn_running_stats", host_us=us)


def _host_us(call: Callable[[], object], check: Check) -> float:
    """Microseconds of a call when nobody waits for its result."""
    number = 10 if check.tiny else _LAUNCHES
    for _ in range(10):
        call()
    _synchronize(check)
    start = time.perf_counter()
    for _ in range(number):
        call()
    seconds = time.perf_counter() - start
    _synchronize(check)
    return 1e6 * seconds / number


def _synchronize(check: Check) -> None:
    if check.device == "cuda":
        torch.cuda.synchronize()


def _available(check: Check) -> list[str]:
    return [name for name in IMPLEMENTATIONS[check.device] if name not in kernels.unavailable()]


def ops(check: Check) -> None:
    """Every op by every implementation on ResNet-50's shapes: a gate, then bytes over time."""
    for name, why in kernels.unavailable().items():
        if name in IMPLEMENTATIONS[check.device]:
            check.record("not measured", implementation=name, reason=why)
    timer = Timer(check)
    gbps, _ = copy_gbps(check, timer)
    torch.manual_seed(0)
    remaining = groups(check.device, check.tiny)
    while remaining and check.left() > (0 if check.tiny else _ENOUGH):
        try:
            for case in remaining.pop(0)():
                _measure(check, case, timer, gbps)
        except torch.OutOfMemoryError as error:
            check.record("out of memory", ok=False, error=str(error)[:300])
    if remaining:
        check.record("out of time", groups_left=len(remaining))


def _measure(check: Check, case: Case, timer: Timer, gbps: float) -> None:
    facts = {
        "variant": case.variant,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
    }
    with fusedres.backend("reference"):
        expected = case.expected()
    aten_ms = None
    for name, make in _sides(check, case):
        try:
            run = make()
            with fusedres.backend("auto" if name == "aten" else name):
                wrong, error = _aten_gate(run(), expected) if name == "aten" else gate(run, expected)
                ms = None if wrong else timer.ms(run)
        except Exception as failure:
            _synchronize(check)  # raises where the GPU can do no more
            wrong, error, ms = f"{type(failure).__name__}: {str(failure).strip()[:300]}", None, None
        if name == "aten":
            aten_ms = ms
        outcome: dict[str, object] = {"ok": wrong is None, "deviation": error}
        if wrong is not None:
            outcome["error"] = wrong
        if ms is not None:
            share = 1e-6 * case.bytes / ms / gbps
            outcome |= {
                "ms": ms,
                "gbps": 1e-6 * case.bytes / ms,
                "share_of_copy": share,
                "meets_target": share >= TARGET,
                "times_aten": None if aten_ms is None else aten_ms / ms,
            }
        check.record(case.op, implementation=name, **facts, **outcome)


def _sides(check: Check, case: Case) -> Iterator[tuple[str, Callable[[], Callable[[], tuple[Tensor, ...]]]]]:
    """Name of whatever has the case, and a maker of its call; ATen first."""
    if case.aten is not None:
        yield "aten", case.aten
    device = torch.device(check.device)
    for name in _available(check):
        # the choice for an op that an implementation has not got is another one
        if all(registered.choice(op, device, case.chosen_by, name).implementation == name for op in case.ops):
            yield name, lambda: case.run


def gate(run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> tuple[str | None, float]:
    """What is wrong with the results of ``run``, if anything, and how far the worst is off."""
    # in this mode memory that nobody wrote is NaN, or 255
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = run()
    finally:
        torch.use_deterministic_algorithms(before)
    worst = 0.0
    for index, (ours, reference) in enumerate(zip(results, expected, strict=True)):
        if ours.shape != reference.shape:
            return f"output {index} has the shape {list(ours.shape)}, not {list(reference.shape)}", worst
        if not ours.is_floating_point():
            off, allowed = (ours != reference).float().mean().item(), _FEW_PLACES
            unit = "of the places" if ours.dtype == torch.uint8 else "of the levels"
        elif ours.dim() == 2:
            scale = reference.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
            off, allowed = (
                ((ours.to(reference.dtype) - reference).abs().amax(1) / scale).max().item(),
                _OF_A_SUM,
            )
            unit = "of the largest in its row"
        else:
            wide = torch.promote_types(reference.dtype, torch.float32)
            truth = reference.to(wide)
            difference = (ours.to(wide) - truth).abs_()
            bound = truth.abs().mul_(_RELATIVE[ours.dtype]).add_(_ABSOLUTE)
            off, allowed = (~(difference <= bound)).float().mean().item(), _FEW
            unit = "of the values off by more than a rounding"
        worst = max(worst, off) if off == off else float("inf")
        if not off <= allowed:
            return f"output {index}: {off:.2g} {unit}, allowed {allowed:.0e}", worst
    return None, worst


def _aten_gate(results: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[str | None, float]:
    """That ATen's counterpart computes the same thing at all: its first output."""
    ours, reference = results[0].detach().float(), expected[0].float()
    error = (torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference)).item()
    return (None if error <= _SAME_THING else f"ATen's result differs by {error:.2g}"), error


def show_copy(records: list[Record]) -> list[str]:
    lines = []
    for record in records:
        if record["name"] == "copy":
            lines.append(f"copy of {record['tensor_bytes'] >> 20} MiB: {record['gbps']:.1f} GB/s")
        elif record["name"] == "launch":
            lines.append(
                f"launch of {record['op']} by {record['implementation']}: {record['host_us']:.1f} us"
            )
        else:
            lines.append(f"{record['name']}: {1e3 * record['ms']:.1f} us between events")
    return lines


def show_ops(records: list[Record]) -> list[str]:
    """By op and implementation, over all shapes and dtypes: shares, and the median ratio to ATen."""
    by: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "ms" in record and record["implementation"] != "aten":
            by[record["name"], record["implementation"]].append(record)
    lines = [f"share of the copy bandwidth, by the bytes of the contract; target {TARGET:.0%}"] if by else []
    for (op, name), found in by.items():
        shares = [record["share_of_copy"] for record in found]
        ratios = [record["times_aten"] for record in found if record["times_aten"]]
        # all of them one after another
        overall = sum(r["share_of_copy"] * r["ms"] for r in found) / sum(r["ms"] for r in found)
        met = sum(record["meets_target"] for record in found)
        line = f"{op:<32}{name:<10}{overall:>4.0%} ({min(shares):.0%} to {max(shares):.0%})"
        line += f", {met} of {len(found)} at the target"
        lines.append(line + (f", {statistics.median(ratios):.2f}x ATen" if ratios else ""))
    for record in records:
        if record["name"] == "not measured":
            lines.append(f"{record['implementation']}: not measured, {record['reason']}")
        elif record["name"] == "out of time":
            lines.append(f"out of time, {record['groups_left']} groups of shapes not measured")
    return lines
