"""Fixtures of the tests of what the nets are combined with."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from ecosystem_nets import fused_by
from torch import distributed

import fusedres

__all__ = ["fused_by", "reference", "two_processes"]


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """Traced and compiled nets are in cycles: gigabytes, until Python's collector comes."""
    yield
    gc.collect()


@pytest.fixture
def reference() -> Iterator[None]:
    """Fused by the reference, which takes float64, too."""
    with fusedres.backend("reference"):
        yield


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """To be called with a function and its arguments; see ``two_processes``."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("PyTorch was built without gloo")
    from two_processes import TwoProcesses

    processes = TwoProcesses(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.end()
