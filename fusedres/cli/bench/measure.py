"""Interleaved timing, and the peak of the memory that a step takes."""

from __future__ import annotations

import ctypes
import math
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from fusedres.cli.bench import breakdown
from fusedres.cli.bench.workload import Step

IN_A_ROW = 4  # steps of a turn
PAUSE_S = 0.02  # before a turn; idle threads have gone to sleep by then


@dataclass
class Samples:
    """One entry a round: milliseconds and, on a CPU, minor page faults of the process."""

    ms: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    def percentile_ms(self, percent: int) -> float:
        """The time that so many percent of the steps took at most: one that was measured."""
        return sorted(self.ms)[math.ceil(percent / 100 * len(self.ms)) - 1]

    @property
    def median_faults(self) -> float | None:
        return statistics.median(self.faults) if self.faults else None


class _CpuTimer:
    def run(self, step: Step, into: Samples) -> None:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        step()
        into.ms.append(1e3 * (time.perf_counter() - start))
        into.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


class _CudaTimer:
    """Times between two events, after the L2 cache was overwritten."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, step: Step, into: Samples) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        into.ms.append(start.elapsed_time(end))


def release_free_memory(device: torch.device) -> None:
    """Give memory that is free but held by the allocator back to the system.

    The check frees gigabytes. Steps that run in what it leaves behind have no page faults, a training
    process of its own has tens of thousands a step. No setting of the allocator is changed.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def interleave(
    steps: Mapping[str, Step], rounds: int, warmup: int, device: torch.device, label: str
) -> dict[str, Samples]:
    """Time every step once a round; the order turns round from one round to the next (ABBA)."""
    timer = _CudaTimer(device) if device.type == "cuda" else _CpuTimer()
    samples = {name: Samples() for name in steps}
    with _progress((warmup + rounds) * len(steps), label) as bar:
        for index in range(warmup + rounds):
            order = list(steps) if index % 2 == 0 else list(steps)[::-1]
            for name in order:
                timer.run(steps[name], samples[name] if index >= warmup else Samples())
                bar.update()
    return samples


def take_turns(steps: Mapping[str, Step], rounds: int, warmup: int, label: str) -> dict[str, Samples]:
    """Time every step ``rounds`` times on a CPU, a few in a row and then the next one's, ABBA as well.

    For inference, whose steps are short: right after another side a step finds the other's weights in the
    caches, and the other's threads still spinning in wait of work, which doubled times at batch 1. So a
    turn begins with a pause and an untimed step.
    """
    timer = _CpuTimer()
    samples = {name: Samples() for name in steps}
    with _progress((warmup + rounds) * len(steps), label) as bar:
        for step in steps.values():
            for _ in range(warmup):
                step()
                bar.update()
        for turn, done in enumerate(range(0, rounds, IN_A_ROW)):
            order = list(steps) if turn % 2 == 0 else list(steps)[::-1]
            for name in order:
                time.sleep(PAUSE_S)
                steps[name]()
                for _ in range(min(IN_A_ROW, rounds - done)):
                    timer.run(steps[name], samples[name])
                    bar.update()
    return samples


def _progress(steps: int, label: str) -> Any:
    return tqdm(total=steps, desc=label, unit="step", disable=None, leave=False)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that tensors made by one untimed step hold at once.

    On top of what was there before: weights, momentum, input. On a CPU from the profiler's record
    of every allocation of a tensor; on a GPU from the caching allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    results: Any = breakdown.record(step, device, memory=True).profiler
    allocations = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
