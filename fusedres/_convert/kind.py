"""What a library's class is converted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    """A class of a library, fused.

    Args:
        fused: derived from it, with the same attributes.
        unfused_reason: why an instance of either doesn't run as one Function, whatever its input; None if it
            does.
        is_net: whether it is a net, of which only the stem is meant, or a block.
    """

    fused: type[nn.Module]
    unfused_reason: Callable[[Any], str | None]
    is_net: bool = False
