"""What a program calls for a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Bound(NamedTuple):
    """A layer on a device: ``run(*tensors, *constants)``.

    Args:
        implementation: what runs it, as explain() names it.
        reason: why that.
    """

    run: Callable[..., Tensor]
    constants: tuple[Any, ...] = ()
    implementation: str = "aten"
    reason: str = "PyTorch's own"
