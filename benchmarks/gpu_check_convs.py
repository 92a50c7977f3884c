"""The parts for convolutions: every fused one of ResNet-50 beside PyTorch's, and the search for settings."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu_check_cases import _batch
from gpu_check_conv_cases import Call, Layer, block_layers, bytes_moved, calls
from gpu_check_net import _MODELS, _workload
from gpu_check_ops import Timer, copy_gbps, gate
from gpu_check_run import Check, Record
from shapes import IMAGE_SIZE
from torch import Tensor

import fusedres
from fusedres import autotune, kernels, ops, plan
from fusedres.cli.bench import workload
from fusedres.plan.conv import BANDWIDTH, PEAK

IMPLEMENTATIONS = {"cuda": ("triton", "cuda"), "cpu": ("reference",)}
_TINY_IMAGE = 32
_OTHER_DTYPES = 3  # layers that are measured in fp16 and fp32, too
_ENOUGH = 3.0  # seconds, for a layer
_WORST = 3  # named in the summary, of each op
# of the size that results are compared at, by dtype of the reference; in float32 many terms are rounded
_EXPONENT = {torch.bfloat16: -10, torch.float16: -7, torch.float64: -3}
_SAME_THING = 0.003  # a float32 result with operands of TF32, in the Euclidean norm


def convs(check: Check) -> None:
    """Every convolution of the blocks by the fused kernels: a gate, then its time beside PyTorch's."""
    if not any_installed(check):
        return
    if check.device == "cuda":
        autotune.load(torch.device(check.device, torch.cuda.current_device()))
    check.record("launch settings", searched_for=len(plan.MEASURED))
    timer = Timer(check)
    gbps, _ = copy_gbps(check, timer)
    batch = _batch(check.device, check.tiny)
    torch.manual_seed(0)
    remaining = _plan(block_layers("resnet50", _TINY_IMAGE if check.tiny else IMAGE_SIZE), batch)
    while remaining and check.left() > (0 if check.tiny else _ENOUGH):
        layer, count, dtype = remaining.pop(0)
        facts = {"variant": str(layer), "count": count, "batch": batch}
        try:
            for call in calls(layer, batch, check.device, dtype):
                measure(check, call, dtype, facts, timer, gbps)
        except torch.OutOfMemoryError as error:
            check.record("out of memory", ok=False, **facts, error=str(error)[:300])
    if remaining:
        check.record("out of time", layers_left=len(remaining))


def any_installed(check: Check) -> bool:
    """Whether an implementation is there to be measured; records why another isn't."""
    missing = {
        name: kernels.unavailable()[name]
        for name in IMPLEMENTATIONS[check.device]
        if name in kernels.unavailable()
    }
    for name, reason in missing.items():
        check.record("not measured", implementation=name, reason=reason)
    return len(missing) < len(IMPLEMENTATIONS[check.device])


def _plan(found: Counter[Layer], batch: int) -> list[tuple[Layer, int, torch.dtype]]:
    """All in bf16, the largest share of a step first; then the first few in the other dtypes."""

    def share(layer: Layer) -> float:
        moved = sum(bytes_moved(op, layer, batch, torch.bfloat16) for op in plan.CONV_OPS)
        flop = len(plan.CONV_OPS) * layer.flop(batch)
        return found[layer] * max(moved / BANDWIDTH, flop / PEAK["bfloat16"])

    layers = sorted(found, key=share, reverse=True)
    plans = [(layer, torch.bfloat16) for layer in layers]
    plans += [(layer, dtype) for dtype in (torch.float16, torch.float32) for layer in layers[:_OTHER_DTYPES]]
    return [(layer, found[layer], dtype) for layer, dtype in plans]


def measure(
    check: Check, call: Call, dtype: torch.dtype, facts: dict[str, object], timer: Timer, gbps: float
) -> None:
    """Record an op by each implementation that has it: whether it is right, its time beside PyTorch's."""
    floor, bound = call.floor_ms(gbps, dtype)
    expected: Tensor | None = None
    peers: dict[str, float] = {}
    for name in _serving(check.device, call, dtype):
        wrong, error, ms = None, None, 0.0
        try:
            if expected is None:
                with fusedres.backend("reference"), _cudnn(allow_tf32=False):
                    expected = call.expected()
            with fusedres.backend(name):
                wrong, error = _checked(check.device, name, call, dtype, expected)
                if wrong is None:
                    ms = timer.ms(call.run)
            if wrong is None:
                peers = peers or _peers(call, timer)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            if check.device == "cuda":
                torch.cuda.synchronize()  # raises where the GPU can do no more
            wrong = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
        outcome: dict[str, object] = {"ok": wrong is None, "deviation": error, "error": wrong}
        if wrong is None:
            outcome |= {
                "ms": ms,
                **peers,
                "share_of_floor": floor / ms,
                "times_plain": peers["plain_ms"] / ms,
                "times_composed": peers["composed_ms"] / ms,
            }
        check.record(
            call.op,
            implementation=name,
            dtype=str(dtype).removeprefix("torch."),
            **facts | {"variant": f"{facts['variant']} by {name}"},
            bytes=call.bytes,
            flop=call.flop,
            floor_ms=floor,
            bound=bound,
            **outcome,
        )


def _serving(device: str, call: Call, dtype: torch.dtype, *, ieee: bool = False) -> list[str]:
    """The implementations with a kernel for a call."""
    names = IMPLEMENTATIONS[device]
    if device == "cpu":
        return list(names)
    able = ops.candidates(call.op, torch.device(device), dtype, call.conv._replace(ieee=ieee))
    return [name for name in names if name in able]


def _checked(
    device: str, name: str, call: Call, dtype: torch.dtype, expected: Tensor
) -> tuple[str | None, float | None]:
    """What is wrong with the results, and how far they are off.

    Products of 16 bits are exact in TF32; those of float32 are held to a rounding where they can be had
    without it, and then to what TF32 leaves.
    """
    wide = dtype == torch.float32
    wrong, error = None, None
    if not wide or name in _serving(device, call, dtype, ieee=True):
        with _cudnn(allow_tf32=not wide):
            wrong, error = conv_gate(call, expected)
    if wrong is None and wide:
        results = call.run()
        wrong = _another_thing(results[0], expected) or _sums_gate(call, results)[0]
    return wrong, error


def _peers(call: Call, timer: Timer) -> dict[str, float]:
    """Milliseconds of PyTorch's convolution, alone and with what stands for the rest."""
    with _cudnn(benchmark=True):  # its trials fall into the warm-up
        found = {"plain_ms": timer.ms(call.plain), "composed_ms": timer.ms(call.composed)}
    if call.halved is not None:  # dgrad and wgrad share it
        found["composed_ms"] -= timer.ms(call.halved) / 2
    return found


@contextlib.contextmanager
def _cudnn(**flags: bool) -> Iterator[None]:
    """Some of torch.backends.cudnn's flags; the context manager of that name sets all."""
    before = {name: getattr(torch.backends.cudnn, name) for name in flags}
    try:
        for name, value in flags.items():
            setattr(torch.backends.cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.backends.cudnn, name, value)


def conv_gate(call: Call, expected: Tensor) -> tuple[str | None, float]:
    """The gate on a call's results; statistics and sums have to be those of what was stored.

    A value may be the small sum of many large terms. So results are brought to a size at which what the gate
    allows beside a relative error is one rounding of a typical value.
    """
    scale = 2.0 ** (_EXPONENT[expected.dtype] - _exponent(expected))
    results: list[Tensor] = []

    def run() -> list[Tensor]:
        results[:] = call.run()
        return [results[0] * scale]

    wrong, error = gate(run, [expected * scale])
    if wrong is not None:
        return wrong, error
    wrong, of_sums = _sums_gate(call, results)
    return wrong, max(error, of_sums)


def _sums_gate(call: Call, results: Sequence[Tensor]) -> tuple[str | None, float]:
    """Statistics and sums against those of what was stored."""
    if call.summed is None:
        return None, 0.0
    stored = results[0].double() if results[0].dtype == torch.float32 else results[0]
    with fusedres.backend("reference"):
        sums = call.summed(stored)
    wrong, of_sums = gate(lambda: results[1:], [sums])
    return None if wrong is None else f"sums over the stored values: {wrong}", of_sums


def _exponent(t: Tensor) -> int:
    size = torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).item()
    return round(math.log2(size / t.numel() ** 0.5)) if size else 0


def _another_thing(ours: Tensor, expected: Tensor) -> str | None:
    error = (torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected)).item()
    return None if error <= _SAME_THING else f"in TF32 it differs by {error:.2g}, allowed {_SAME_THING}"


def show_convs(records: list[Record]) -> list[str]:
    """By op, implementation and dtype, each layer as often as a net has it; the worst beside their floor."""
    by: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "ms" in record:
            by[record["name"], record["implementation"], record["dtype"]].append(record)
    lines = ["x: PyTorch's time over ours, its convolution alone and with batch-norm ops"] if by else []
    for (op, name, dtype), found in by.items():

        def total(key: str, found: list[Record] = found) -> float:
            return sum(record["count"] * record[key] for record in found)

        ms = total("ms")
        line = f"{op:<17}{name:<10}{dtype:<9}{len(found):>3} layers, {ms:.2f} ms, "
        line += f"{total('floor_ms') / ms:.0%} of the floor, "
        line += f"{total('plain_ms') / ms:.2f}x alone, {total('composed_ms') / ms:.2f}x with the ops"
        lines.append(line)
        worst = sorted(found, key=lambda r: r["count"] * (r["ms"] - r["floor_ms"]), reverse=True)[:_WORST]
        lines += [
            f"  {record['count']}x {record['variant']}: {1e3 * record['ms']:.1f} us, "
            f"{record['share_of_floor']:.0%} of the floor ({record['bound']}), {record['times_plain']:.2f}x, "
            f"{record['times_composed']:.2f}x"
            for record in worst
        ]
    for record in records:
        if record["name"] == "not measured":
            lines.append(f"{record['implementation']}: not measured, {record['reason']}")
        elif record["name"] == "out of time":
            lines.append(f"out of time, {record['layers_left']} layers not measured")
    return lines


class _OutOfTime(Exception):
    """Ends a search between two measurements."""


def tune(check: Check) -> None:
    """Every launch setting of the convolutions of a training step; kept on disk for the parts that follow."""
    batch = _workload(check)
    choice = ops.choice("conv_fwd", batch.device, batch.dtype, "auto")
    if not choice.open:
        check.record("not measured", reason=f"autotune needs a GPU with fused convolutions ({choice.reason})")
        return

    def watch(op: str, conv: plan.Conv, measured: plan.Measured) -> None:
        facts = {"variant": str(conv), "conv": conv._asdict(), **measured._asdict()}
        check.record(op, dtype=str(batch.dtype).removeprefix("torch."), **facts)
        if check.left() <= 0:  # each is on disk already
            raise _OutOfTime

    def told(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message).startswith("fusedres:"):  # a setting that doesn't compile, or nothing can be kept
            check.record("warning", ok=False, error=str(message)[:300])

    torch.backends.cudnn.benchmark = True  # as the training step is timed
    model = getattr(fusedres, _MODELS[check.tiny])()
    model.to(batch.device, memory_format=torch.channels_last).train()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = told
        try:
            with autotune.searching(watch):
                workload.training_step(model, batch)()
        except _OutOfTime:
            check.record("out of time")
    check.record("kept", file=str(autotune.path(torch.cuda.get_device_name(batch.device))))


def show_tune(records: list[Record]) -> list[str]:
    """By op: how many the fused kernel wins, and PyTorch's time over the best, each shape once."""
    by: dict[str, list[Record]] = defaultdict(list)
    lines = []
    for record in records:
        if "us" in record:
            by[record["name"]].append(record)
    for op, found in by.items():
        fused = sum(record["best"] != autotune.ATEN for record in found)
        aten = sum(record["us"][autotune.ATEN] for record in found)
        best = sum(min(record["us"].values()) for record in found)
        lines.append(f"{op:<11}{fused} of {len(found)} fused, all together {aten / best:.2f}x PyTorch's own")
    for record in records:
        if record["name"] == "not measured":
            lines.append(f"not measured, {record['reason']}")
        elif record["name"] == "out of time":
            lines.append("out of time, the shapes that are left were not measured")
    return lines
