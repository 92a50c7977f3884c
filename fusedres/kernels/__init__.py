"""The implementations of the ops, loaded on first use.

Each is a module with one function per op it has, named as the op: ``reference`` (plain PyTorch),
``cpu`` and ``cuda`` (the compiled module) and ``triton``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType


class NoSuchSetting(Exception):
    """A kernel has fewer launch settings than a trial asked for."""


@functools.cache
def load(name: str) -> ModuleType:
    """The module of implementation ``name``."""
    return importlib.import_module(f"fusedres.kernels.{name}")


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """What the CUDA kernels were compiled for; empty if there are none."""
    try:
        from fusedres import _C
    except ImportError:
        return ()
    return tuple(map(str, _C.cuda_archs))


@functools.cache
def unavailable() -> dict[str, str]:
    """Implementation name -> why it can't be loaded here."""
    why = {}
    try:
        from fusedres import _C
    except ImportError as error:
        why["cpu"] = why["cuda"] = f"the compiled module can't be loaded ({error})"
    else:
        if not _C.cuda_archs:
            why["cuda"] = f"built without CUDA ({_C.cuda_reason})"
    if importlib.util.find_spec("triton") is None:
        why["triton"] = "triton is not installed"
    return why
