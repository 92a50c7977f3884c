"""Fixtures and rules for the whole suite."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import build

import fusedres
from fusedres import kernels, ops, plan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("FUSEDRES_DATA")
    if not folder:
        pytest.skip("FUSEDRES_DATA isn't set")
    return Path(folder)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, so a value that a kernel leaves out is seen."""

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned_allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


ISAS = ("generic", "avx2", "avx512", "avx512bf16")
EMULATED = build.is_set()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


GPU_BACKENDS = ["triton", "cuda"] if torch.cuda.is_available() else []


def _on_a_gpu() -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS]


@contextlib.contextmanager
def _run_by(name: str) -> Iterator[None]:
    """Every op by one GPU implementation, on tensors of the device that has it."""
    if name == "emulated":
        from emulation.cuda_on_cpu import cuda_on_cpu, module

        module().seed(0)
        with cuda_on_cpu():
            yield
    elif name == "interpreted":
        with fusedres.backend("triton"):
            yield
    else:
        if name in kernels.unavailable():
            pytest.skip(kernels.unavailable()[name])
        with torch.device("cuda"), fusedres.backend(name):
            yield


@pytest.fixture(
    params=["emulated"]
    if EMULATED
    else ["interpreted"]
    if INTERPRETED
    else _on_a_gpu() or [pytest.param("none", marks=pytest.mark.gpu)]
)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation for GPUs, there or on a CPU."""
    with _run_by(request.param):
        yield request.param


@pytest.fixture
def multiprocessors(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets how many multiprocessors launches are divided among."""
    if gpu_backend in ("interpreted", "triton"):
        from fusedres.kernels.triton import config

        def use(count: int) -> None:
            monkeypatch.setattr(config, "_facts", lambda device: (config.MIN_ARCH, count))
            config.divide.cache_clear()

        yield use
        config.divide.cache_clear()
        return
    from fusedres.kernels.cuda import launch

    def use(count: int) -> None:
        monkeypatch.setattr(launch, "multiprocessors", lambda device: count)
        launch.forget_sizes()

    yield use
    launch.forget_sizes()


@pytest.fixture
def without_cuda_convolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend("cuda")`` on a CPU is the way of a GPU, with PyTorch's convolutions and average pool."""
    own = {*plan.CONVOLUTIONS, *plan.AVGPOOL_OPS}
    monkeypatch.setitem(plan.OPS, "cuda", plan.OPS["cuda"] - own)
    ops.choice.cache_clear()
    yield
    ops.choice.cache_clear()


@pytest.fixture(params=["emulated"] if EMULATED else ["reference", *ISAS, *_on_a_gpu()])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The fused path through one implementation, or one instruction set of the compiled one."""
    if request.param == "reference":
        with fusedres.backend("reference"):
            yield "reference"
        return
    if request.param not in ISAS:
        with _run_by(request.param):
            yield request.param
        return
    if "cpu" in kernels.unavailable():
        pytest.skip(kernels.unavailable()["cpu"])
    from fusedres import _C

    before = _C.cpu_isa()
    try:
        _C.use_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    with fusedres.backend("cpu"):
        yield request.param
    _C.use_cpu_isa(before)
