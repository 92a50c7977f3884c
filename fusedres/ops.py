"""The registered ops: schemas, fakes, and the way from a call to a kernel.

Nothing else knows torch.library. An op's arithmetic lives in ``kernels``; ``plan`` says which
implementation serves a call. Here tensors are checked, brought into one memory layout, and the
outputs allocated, so that an implementation only computes.

``stats`` is [5, C] with the rows mean, biased variance, rstd, scale, shift; ``sums`` is [2, C] with
the rows dbias, dweight. Both are float32 (float64 for a float64 activation).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedres import kernels, plan
from fusedres.kernels.rows import STATS_ROWS, SUMS_ROWS

SCHEMAS = {
    "bn_stats": "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "bn_running_stats": (
        "(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps) -> Tensor"
    ),
    "bn_update_running_": (
        "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats, int count, float momentum) -> ()"
    ),
    "bn_act": "(Tensor x, Tensor stats, Tensor? residual, bool relu) -> Tensor",
    # z is the stored output, given where a residual went into it: then du is written as well
    "bn_act_backward_reduce": (
        "(Tensor grad, Tensor x, Tensor? z, Tensor stats, bool relu) -> (Tensor du, Tensor sums)"
    ),
    "bn_act_backward_reduce_": "(Tensor(a!) grad, Tensor x, Tensor z, Tensor stats) -> Tensor",
    "bn_act_backward_apply": "(Tensor grad, Tensor x, Tensor stats, Tensor? sums, bool relu) -> Tensor",
    "bn_act_backward_apply_": ("(Tensor(a!) grad, Tensor x, Tensor stats, Tensor? sums, bool relu) -> ()"),
}

_library: Any = torch.library.Library("fusedres", "DEF")  # type: ignore[no-untyped-call]
_forced: list[str] = [os.environ.get("FUSEDRES_BACKEND", "auto")]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for every op called inside, in every thread of the process.

    Args:
        name: "auto" (the rules of ``plan``), "triton", "cuda", "cpu" or "reference". The environment
            variable FUSEDRES_BACKEND sets the same for a whole process.

    Raises:
        ValueError: no such backend.
        RuntimeError: (by an op called inside) the backend can't serve it; says why.
    """
    _check_backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str:
    """What :func:`backend` or FUSEDRES_BACKEND asks for; "auto" if nothing."""
    return _forced[-1]


def _check_backend(name: str) -> None:
    if name not in plan.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(plan.BACKENDS)}, got {name!r}")


@functools.lru_cache(maxsize=1024)
def choice(op: str, device: torch.device, dtype: torch.dtype, forced: str) -> plan.Choice:
    """The implementation that serves ``op`` on ``device``, and why."""
    _check_backend(forced)
    problem = plan.Problem(
        op=op,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
    )
    return plan.choose(problem, kernels.unavailable(), forced)


def served_from(op: str, device: torch.device, dtype: torch.dtype, forced: str) -> int | None:
    """Values of an activation from which a kernel of ours runs; None if PyTorch's own operators do."""
    implementation = choice(op, device, dtype, forced).implementation
    if implementation == "aten":
        return None
    return plan.least_values(implementation, str(dtype).removeprefix("torch.")) if forced == "auto" else 0


# torch.compiler.assume_constant_result without its import of dynamo, which takes a second
served_from._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kernel(op: str, x: Tensor) -> Callable[..., None]:
    name = choice(op, x.device, x.dtype, forced_backend()).implementation
    return getattr(kernels.load("reference" if name == "aten" else name), op)  # type: ignore[no-any-return]


def layout(x: Tensor) -> torch.memory_format:
    """The layout that kernels get x in: channels_last, except that a CPU's take NCHW as it is."""
    nchw = x.device.type == "cpu" and forced_backend() != "triton"
    if nchw and not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new_stats(x: Tensor, channels: int) -> Tensor:
    return torch.empty((STATS_ROWS, channels), dtype=stats_dtype(x), device=x.device)


def _check_vectors(x: Tensor, shape: tuple[int, ...], **vectors: Tensor | None) -> None:
    """Kernels get bare pointers: what they would misread is refused here."""
    dtype, device = stats_dtype(x), x.device
    for name, v in vectors.items():
        if v is None or (v.dtype is dtype and v.shape == shape and v.device == device and v.is_contiguous()):
            continue
        if v.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, got {v.dtype}")
        raise ValueError(
            f"{name} must be contiguous, {list(shape)} on {device}, "
            f"got {list(v.shape)} with strides {v.stride()} on {v.device}"
        )


def _check_activations(x: Tensor, stats: Tensor, **others: Tensor | None) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(shape)}")
    _check_vectors(x, (STATS_ROWS, shape[1]), stats=stats)
    for name, t in others.items():
        if t is None or (t.dtype is dtype and t.shape == shape and t.device == device):
            continue
        if t.dtype is not dtype:
            raise TypeError(f"{name} must have the dtype of x, {dtype}, got {t.dtype}")
        raise ValueError(
            f"{name} must have the shape and device of x, {list(shape)} on {device}, "
            f"got {list(t.shape)} on {t.device}"
        )


def _laid_out(memory: torch.memory_format, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous(memory_format=memory) for t in tensors]


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = x.shape[1]
    _check_vectors(x, (channels,), weight=weight, bias=bias)
    (x,) = _laid_out(layout(x), x)
    stats = _new_stats(x, channels)
    _kernel("bn_stats", x)(x, weight, bias, eps, stats)
    return stats


def bn_running_stats(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    channels = running_mean.shape[0]
    _check_vectors(
        running_mean,
        (channels,),
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    stats = _new_stats(running_mean, channels)
    _kernel("bn_running_stats", running_mean)(running_mean, running_var, weight, bias, eps, stats)
    return stats


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    channels = running_mean.shape[0]
    _check_vectors(running_mean, (channels,), running_mean=running_mean, running_var=running_var)
    _check_vectors(running_mean, (STATS_ROWS, channels), stats=stats)
    if count < 2:
        raise ValueError(f"count must be at least 2 values per channel, got {count}")
    _kernel("bn_update_running_", running_mean)(running_mean, running_var, stats, count, momentum)


def bn_act(x: Tensor, stats: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    _check_activations(x, stats, residual=residual)
    memory = layout(x)
    x, residual = _laid_out(memory, x, residual)
    z = torch.empty_like(x, memory_format=memory)
    _kernel("bn_act", x)(x, stats, residual, relu, z)
    return z


def bn_act_backward_reduce(
    grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    _check_activations(x, stats, grad=grad, z=z)
    memory = layout(x)
    grad, x, z = _laid_out(memory, grad, x, z)
    du = None if z is None else torch.empty_like(x, memory_format=memory)
    sums = stats.new_empty((SUMS_ROWS, x.shape[1]))
    _kernel("bn_act_backward_reduce", x)(grad, x, z, stats, relu, du, sums)
    return x.new_empty(0) if du is None else du, sums


def _check_in_place(grad: Tensor, memory: torch.memory_format) -> None:
    if not grad.is_contiguous(memory_format=memory):
        raise ValueError(
            f"grad is written over, so it must be in the layout of x, {memory}, got {grad.stride()}"
        )


def bn_act_backward_reduce_(grad: Tensor, x: Tensor, z: Tensor, stats: Tensor) -> Tensor:
    _check_activations(x, stats, grad=grad, z=z)
    memory = layout(x)
    _check_in_place(grad, memory)
    x, z = _laid_out(memory, x, z)
    sums = stats.new_empty((SUMS_ROWS, x.shape[1]))
    _kernel("bn_act_backward_reduce", x)(grad, x, z, stats, True, grad, sums)
    return sums


def bn_act_backward_apply(grad: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, relu: bool) -> Tensor:
    _check_activations(x, stats, grad=grad)
    _check_vectors(x, (SUMS_ROWS, x.shape[1]), sums=sums)
    memory = layout(x)
    grad, x = _laid_out(memory, grad, x)
    out = torch.empty_like(x, memory_format=memory)
    _kernel("bn_act_backward_apply", x)(grad, x, stats, sums, relu, out)
    return out


def bn_act_backward_apply_(grad: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, relu: bool) -> None:
    _check_activations(x, stats, grad=grad)
    _check_vectors(x, (SUMS_ROWS, x.shape[1]), sums=sums)
    memory = layout(x)
    _check_in_place(grad, memory)
    (x,) = _laid_out(memory, x)
    _kernel("bn_act_backward_apply", x)(grad, x, stats, sums, relu, grad)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout(x))


_FAKES: dict[str, Callable[..., Any]] = {
    "bn_stats": lambda x, weight, bias, eps: _new_stats(x, x.shape[1]),
    "bn_running_stats": lambda mean, var, weight, bias, eps: _new_stats(mean, mean.shape[0]),
    "bn_update_running_": lambda mean, var, stats, count, momentum: None,
    "bn_act": lambda x, stats, residual, relu: _like(x),
    "bn_act_backward_reduce": lambda grad, x, z, stats, relu: (
        x.new_empty(0) if z is None else _like(x),
        stats.new_empty((SUMS_ROWS, x.shape[1])),
    ),
    "bn_act_backward_reduce_": lambda grad, x, z, stats: stats.new_empty((SUMS_ROWS, x.shape[1])),
    "bn_act_backward_apply": lambda grad, x, stats, sums, relu: _like(x),
    "bn_act_backward_apply_": lambda grad, x, stats, sums, relu: None,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, globals()[_name], _key)
    torch.library.register_fake(f"fusedres::{_name}", _FAKES[_name], lib=_library)
