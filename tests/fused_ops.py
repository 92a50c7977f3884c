"""A counter of our ops, so that a test can tell a fused result from ATen's."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FusedOps(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def names(self) -> dict[str, int]:
        """Calls by op alone."""
        return {name: n for name, n in self.calls.items() if " " not in name}

    @property
    def batch_norms(self) -> int:
        """How many batch norms our ops made the vectors of."""
        fused = ("conv_fwd with statistics", "stem_conv with statistics")
        ways = ("bn_stats", "bn_running_stats", *fused)
        return sum(self.calls[way] for way in ways)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedres":
            self.calls[func._opname] += 1
            if func._opname == "conv_fwd" and args[-1]:
                self.calls["conv_fwd with statistics"] += 1
            if func._opname == "stem_conv" and args[-2]:
                self.calls["stem_conv with statistics"] += 1
        return func(*args, **(kwargs or {}))
