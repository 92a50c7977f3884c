"""Where the time of one step goes, from torch.profiler: so that ATen can't pass for a fused kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusedres.cli.bench.workload import Step

OWN = "fusedres other"  # pools, casts of weights
ONE_PASS = "convolution + bias, ReLU"

# category -> beginnings of the operators' names. The outermost operator that is listed decides, with
# all that it calls: the optimizer's additions are the optimizer's, a fused op's copies the fused op's
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    OWN: ("fusedres::",),
    "fusedres batch norm": ("fusedres::bn_",),
    "fusedres convolution": ("fusedres::conv", "fusedres::stem"),
    "convolution": (
        "aten::conv",
        "aten::_conv",
        "aten::cudnn_convolution",
        "aten::mkldnn_convolution",
        "mkldnn::_convolution",
    ),
    # what torch.compile with freezing and optimize_for_inference make of a folded convolution and the
    # residual add and ReLU behind it; their names begin as a plain one's, so the last that fits counts
    ONE_PASS: (
        "mkldnn::_convolution_pointwise",
        "aten::cudnn_convolution_relu",
        "aten::cudnn_convolution_add_relu",
    ),
    "batch norm, ReLU": (
        "aten::batch_norm",
        "aten::_batch_norm",
        "aten::native_batch_norm",
        "aten::cudnn_batch_norm",
        "aten::batch_norm_backward",
        "aten::relu",
        "aten::clamp_min",
        "aten::threshold_backward",
    ),
    "add": ("aten::add.", "aten::add_"),
    "pool": ("aten::max_pool2d", "aten::adaptive_avg_pool2d", "aten::mean"),
    "optimizer": ("Optimizer.",),
}
OTHER = "other"
STEPS = 3


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds by category of one profiled step."""

    ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        return sum(self.ms.values())

    @property
    def fused_norm_share(self) -> float:
        """Part of the batch-norm and ReLU time that is spent in this package's kernels."""
        return _part(self.ms["fusedres batch norm"], self.ms["batch norm, ReLU"])

    @property
    def fused_convolution_share(self) -> float:
        """Part of the convolutions' time that is spent in this package's kernels."""
        return _part(self.ms["fusedres convolution"], self.ms["convolution"] + self.ms[ONE_PASS])

    @property
    def own_share(self) -> float:
        """Part of all the time that is spent in this package's kernels."""
        own = sum(ms for name, ms in self.ms.items() if name.startswith("fusedres"))
        return _part(own, self.total_ms - own)

    @property
    def one_pass_share(self) -> float:
        """Part of the convolutions' time in which bias, residual add and ReLU are in the same pass."""
        return _part(self.ms["fusedres convolution"] + self.ms[ONE_PASS], self.ms["convolution"])

    @property
    def ceiling(self) -> float:
        """How many times faster the step would be if batch norm, ReLU and add cost nothing."""
        kept = self.total_ms - self.ms["batch norm, ReLU"] - self.ms["add"]
        return self.total_ms / kept


def _part(ours: float, others: float) -> float:
    return ours / (ours + others) if ours > 0 else 0.0


def record(step: Step, device: torch.device, memory: bool = False) -> profile:
    """One step under torch.profiler, with every allocation if ``memory``."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes its own news to stderr
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    recorded = profile(activities=activities, profile_memory=memory)
    with recorded:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return recorded


def of(step: Step, device: torch.device) -> Breakdown:
    """The breakdown of a step, the fastest of a few: of the CPU's time, or on a GPU of its kernels'."""
    return min((_once(step, device) for _ in range(STEPS)), key=lambda parts: parts.total_ms)


def _once(step: Step, device: torch.device) -> Breakdown:
    ms = dict.fromkeys((*CATEGORIES, OTHER), 0.0)
    events: Any = record(step, device).events()  # type: ignore[no-untyped-call]
    for event in events:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own > 0 and event.device_type.name == "CPU":
            ms[_category(event)] += own / 1e3
    return Breakdown(ms)


def _category(event: Any) -> str:
    found = OTHER
    while event is not None:
        name = event.name + "."
        for category, beginnings in CATEGORIES.items():
            if name.startswith(beginnings):
                found = category
        event = event.cpu_parent
    return found
