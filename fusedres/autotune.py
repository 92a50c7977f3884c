"""Which implementation is faster for a convolution on this GPU: measured on first use, kept on disk.

Every convolution can run by a fused kernel, or by PyTorch's own with the batch-norm ops around it (in a
trained net: with bias, residual and ReLU; of 8 bits: in floating point between two conversions). Until it is
measured a prediction decides (``plan.likely``); on a GPU the first use of a shape measures both, as
torch.backends.cudnn.benchmark does. What was measured is written before it is first used, in a file for
this device and these versions, so that other processes and later runs add up in the same order. Nothing is
measured while a CUDA graph is captured, nor under torch.use_deterministic_algorithms: there the files and
the predictions decide.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import _version, kernels, ops, plan

WARM_UP, ROUNDS = 2, 7
# written between two runs, so that none finds its input in the L2 cache
FLUSH_BYTES = 256 << 20
# how long to wait for another process that is writing
LOCK_SECONDS = 10
ATEN = "aten"

Run = Callable[[], Any]
# entered for a run; gives the settings that its kernels were launched with
Trial = Callable[[], contextlib.AbstractContextManager[Any]]


class Search(NamedTuple):
    """A search through every launch setting.

    Args:
        watch: called with op, shape and result after each measurement.
        done: what was measured in it.
    """

    watch: Callable[[str, plan.Conv, plan.Measured], None]
    done: set[plan.Key]


_searches: list[Search] = []


@contextlib.contextmanager
def searching(watch: Callable[[str, plan.Conv, plan.Measured], None]) -> Iterator[None]:
    """Inside, every launch setting of a kernel is measured, also for shapes that were measured before."""
    _searches.append(Search(watch, set()))
    try:
        yield
    finally:
        _searches.pop()


def fused(op: str, x: Tensor, conv: plan.Conv, run: Callable[[bool], Any]) -> bool:
    """Whether a kernel of ours runs a convolution; measures on first use.

    Args:
        op: of ``plan.CONV_OPS``, ``plan.CONV_BIAS_OPS``, ``plan.INT8_OPS`` or ``plan.STEM_OPS``.
        x: an activation of the call.
        conv: its shape.
        run: runs the convolution, fused or not; has no effect but its result.
    """
    device, dtype, forced = x.device, x.dtype, ops.forced_backend()
    if device.type == "cuda" and forced == "auto":
        load(device)
        if ops.choice(op, device, dtype, forced, conv).open and _may_measure(device):
            _measure_if_new(plan.Key(_name(device), op, _short(dtype), conv), device, run)
    return ops.served(op, device, dtype, forced, conv)


def _may_measure(device: torch.device) -> bool:
    return not torch.are_deterministic_algorithms_enabled() and not torch.cuda.is_current_stream_capturing()


def _measure_if_new(key: plan.Key, device: torch.device, run: Callable[[bool], Any]) -> None:
    search = _searches[-1] if _searches else None
    if key in plan.MEASURED if search is None else key in search.done:
        return
    try:
        measured = _measure(key, device, run, search is not None)
    except torch.OutOfMemoryError:
        return  # there is room for the step itself, but not for both ways
    plan.MEASURED[key] = measured
    ops.choice.cache_clear()
    save(device, key, measured)
    if search is not None:
        search.done.add(key)
        search.watch(key.op, key.conv, measured)


def _measure(key: plan.Key, device: torch.device, run: Callable[[bool], Any], every: bool) -> plan.Measured:
    runs: dict[str, Run] = {ATEN: lambda: run(False)}
    tried: dict[str, tuple[str, Any]] = {ATEN: (ATEN, {})}  # implementation and settings
    for name in ops.candidates(key.op, device, getattr(torch, key.dtype), key.conv):
        for trial in _trials(name, every):

            def one(name: str = name, trial: Trial = trial) -> Any:
                with ops.backend(name), trial() as seen:
                    run(True)
                return seen

            try:
                seen = dict(one())
            except kernels.NoSuchSetting:
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler's or a driver's; the other ways work
                warnings.warn(f"fusedres: {key.op} of {key.conv} can't be measured: {error}", stacklevel=2)
            else:
                label = " + ".join(sorted({str(setting) for setting in seen.values()})) or name
                runs[label], tried[label] = one, (name, seen)
    us = timed(runs, device)
    implementation, chosen = tried[min(us, key=us.__getitem__)]
    if not chosen:
        return plan.Measured(implementation, us, [])
    settings = kernels.load(implementation).settings
    settings.prefer(chosen)
    return plan.Measured(implementation, us, settings.dump(chosen))


def _trials(implementation: str, every: bool) -> Iterator[Trial]:
    """The first launch setting of an implementation, or every one; CUDA kernels choose theirs themselves."""
    if implementation != "triton":
        yield lambda: contextlib.nullcontext({})
        return
    settings = kernels.load(implementation).settings
    for index in itertools.count() if every else (0,):
        yield functools.partial(settings.trial, index)


def timed(runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """Median time of each in microseconds, one after the other in every round."""
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                flush.zero_()
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize(device)
    return {
        name: 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions(device_name: str) -> dict[str, str]:
    """What a measurement depends on beside its key."""
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    return {
        "fusedres": _version.__version__,
        "torch": torch.__version__,
        "triton": compiler,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "device": device_name,
    }


def path(device_name: str) -> Path:
    """The file for a device and these versions, beside PyTorch's own caches."""
    stamp = hashlib.sha256(json.dumps(versions(device_name), sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(torch.hub.get_dir()).parent / "fusedres" / f"autotune-{name}-{stamp}.json"


@functools.cache
def load(device: torch.device) -> None:
    """Take what was measured on this device before; once a process."""
    name = _name(device)
    found = read(path(name), name)
    for key, measured in found.items():
        plan.MEASURED.setdefault(key, measured)
        if measured.settings and measured.best not in kernels.unavailable():
            settings = kernels.load(measured.best).settings
            settings.prefer(settings.parse(measured.settings))
    if found:
        ops.choice.cache_clear()


def read(file: Path, device_name: str) -> dict[plan.Key, plan.Measured]:
    """The measurements in a file; none, with a warning, if it isn't one or is another device's."""
    try:
        text = file.read_text()
    except OSError:
        return {}
    try:
        content = json.loads(text)
        if content["versions"] != versions(device_name):
            raise ValueError("it is for another device or other versions")
        return {
            plan.Key(device_name, e["op"], e["dtype"], plan.Conv(*e["conv"])): _entry(e)
            for e in content["entries"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fusedres: {file} is ignored and will be written anew: {error}", stacklevel=2)
        return {}


def _entry(e: Any) -> plan.Measured:
    us = {str(name): float(value) for name, value in e["us"].items()}
    if e["best"] not in plan.IMPLEMENTATIONS and e["best"] != ATEN:
        raise ValueError(f"no implementation {e['best']!r}")
    if not all(math.isfinite(value) for value in us.values()):
        raise ValueError("a time that is no number")
    if "triton" not in kernels.unavailable():
        kernels.load("triton").settings.parse(e["settings"])
    return plan.Measured(e["best"], us, e["settings"])


def save(device: torch.device, key: plan.Key, measured: plan.Measured) -> None:
    """Write a measurement beside those that are in the file; other processes may do so at the same time."""
    from filelock import FileLock, Timeout

    file = path(key.device_name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # told when it was loaded
                entries = read(file, key.device_name)
            entries[key] = measured
            _write(file, key.device_name, entries)
    except (OSError, Timeout) as error:
        _tell_once(f"fusedres: measurements are kept for this process alone: {error}")


def _write(file: Path, device_name: str, entries: dict[plan.Key, plan.Measured]) -> None:
    content = {
        "versions": versions(device_name),
        "entries": [
            {"op": key.op, "dtype": key.dtype, "conv": list(key.conv), **m._asdict()}
            for key, m in entries.items()
        ],
    }
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=1)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def _tell_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
