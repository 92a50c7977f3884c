"""What is made of layers' parameters for a machine: once, for all programs that ask for the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Prepared:
    """Packed and converted parameters, by layer and kind; forgotten with the parameters they are made of."""

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Module, Hashable], object] = {}

    def of(self, layer: nn.Module, kind: Hashable, make: Callable[[], T]) -> T:
        """What was made of ``layer`` under the name ``kind``, or ``make()`` from now on."""
        key = (layer, kind)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]
