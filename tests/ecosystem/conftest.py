"""Fixtures of the tests of what the nets are combined with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ecosystem_nets import fused_by

import fusedres

__all__ = ["fused_by", "reference"]


@pytest.fixture
def reference() -> Iterator[None]:
    """Fused by the reference, which takes float64, too."""
    with fusedres.backend("reference"):
        yield
