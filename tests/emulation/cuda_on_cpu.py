"""The "cuda" backend on CPU tensors, by the emulated kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from emulation import build
from torch import Tensor

import fusedres
from fusedres import kernels, ops, plan
from fusedres.kernels.cuda import launch

MULTIPROCESSORS = 2


@functools.cache
def module() -> ModuleType:
    """The compiled module's CUDA part, every kernel and launcher of it, over the emulation."""
    bindings = sorted((build.ROOT / "csrc").glob("bindings_cuda*.cpp"))
    sources = [*bindings, *sorted(build.CUDA.glob("*.cu"))]
    return build.load(build.build("_emulated", sources, ["FUSEDRES_BIND_CUDA"]))


@contextlib.contextmanager
def cuda_on_cpu(multiprocessors: int = MULTIPROCESSORS) -> Iterator[None]:
    """Inside, ``fusedres.backend("cuda")`` is in force and takes CPU tensors.

    Everything from the op to the kernel is what a GPU would run, but for the stream, the number of
    multiprocessors and the execution itself.
    """

    def run(name: str, x: Tensor, *arguments: Any) -> None:
        function = getattr(module(), f"cuda_{name}")
        function(*launch.addresses(arguments), launch.multiprocessors(x.device), 0)

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(launch, "C", module()),
            mock.patch.object(launch, "run", run),
            mock.patch.object(launch, "multiprocessors", lambda device: multiprocessors),
            mock.patch.dict(plan.DEVICE, {"cuda": "cpu"}),
            mock.patch.object(kernels, "unavailable", lambda: {}),
        ):
            stack.enter_context(patch)
        _forget()
        stack.callback(_forget)
        stack.enter_context(fusedres.backend("cuda"))
        yield


def _forget() -> None:
    ops.choice.cache_clear()
    launch.forget_sizes()
