"""From an op and a tensor to the kernel that serves them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedres import kernels, plan

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


@functools.lru_cache(maxsize=4096)
def choice(
    op: str, device: torch.device, dtype: torch.dtype, forced: str, conv: plan.Conv | None = None
) -> plan.Choice:
    """The implementation that serves ``op`` on ``device``, and why; ``conv``: on that shape."""
    _check_backend(forced)
    return plan.choose(_problem(op, device, dtype, conv), kernels.unavailable(), forced)


def candidates(op: str, device: torch.device, dtype: torch.dtype, conv: plan.Conv) -> list[str]:
    """The implementations with a kernel for a convolution, the likeliest first."""
    return plan.able(_problem(op, device, dtype, conv), kernels.unavailable())


def _problem(op: str, device: torch.device, dtype: torch.dtype, conv: plan.Conv | None) -> plan.Problem:
    return plan.Problem(
        op=op,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        built_for=kernels.cuda_architectures(),
        conv=conv,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" and conv else None,
    )


def served_from(op: str, device: torch.device, dtype: torch.dtype, forced: str) -> int | None:
    """Values of an activation from which a kernel of ours runs; None if PyTorch's own operators do."""
    implementation = choice(op, device, dtype, forced).implementation
    if implementation == "aten":
        return None
    if forced != "auto":
        return 0
    return plan.least_values(implementation, op)


# torch.compiler.assume_constant_result without its import of dynamo, which takes a second
served_from._dynamo_marked_constant = True  # type: ignore[attr-defined]


def served(
    op: str, device: torch.device, dtype: torch.dtype, forced: str, conv: plan.Conv | None = None
) -> bool:
    """Whether a kernel of ours runs, and not the PyTorch operators that an op can be composed of."""
    return choice(op, device, dtype, forced, conv).implementation != "aten"


def kernel(op: str, x: Tensor, conv: plan.Conv | None = None) -> Callable[..., None]:
    name = choice(op, x.device, x.dtype, forced_backend(), conv).implementation
    return getattr(kernels.load("reference" if name == "aten" else name), op)  # type: ignore[no-any-return]


def layout(x: Tensor) -> torch.memory_format:
    """The layout that kernels get x in: channels_last, except that a CPU's take NCHW as it is."""
    nchw = x.device.type == "cpu" and forced_backend() not in ("triton", "cuda")
    if nchw and not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
