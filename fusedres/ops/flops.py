"""FLOP of the convolutions; importing this registers them with torch.utils.flop_counter.

The package itself doesn't: torch.utils.flop_counter imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.fusedres
_Shape = tuple[int, ...]


def _halved(x: _Shape, weight: _Shape) -> _Shape:
    """Of a convolution's output with stride 2, whatever pool is behind it."""
    return x[0], weight[0], (x[2] + 1) // 2, (x[3] + 1) // 2


# an op's raw output (or that output's gradient) and its weight, of the arguments' and the results' shapes
_CONVOLUTIONS: dict[str, Callable[[Any, Any], tuple[_Shape, _Shape]]] = {
    "conv_fwd": lambda args, out: (out[0], args[5]),
    "conv_dgrad": lambda args, out: (args[0], args[4]),
    "conv_wgrad": lambda args, out: (args[0], args[7]),
    "conv_bias_act": lambda args, out: (out, args[1]),
    "conv_int8": lambda args, out: (out, args[2]),
    "stem_conv": lambda args, out: (out[0], args[1]),
    "stem_wgrad": lambda args, out: (args[0], args[2]),
    "stem_bias_act": lambda args, out: (_halved(args[0], args[1]), args[1]),
}


def _formula(shapes: Callable[[Any, Any], tuple[_Shape, _Shape]]) -> Callable[..., int]:
    def flop(*args: Any, out_shape: Any = None, **_: Any) -> int:
        y, weight = shapes(args, out_shape)
        return 2 * math.prod(y) * math.prod(weight[1:])

    return flop


def _of_block(x: _Shape, weight1: _Shape, _: Any, weight2: _Shape, *rest: Any, **__: Any) -> int:
    positions, inner = x[0] * math.prod(x[2:]), weight2[0]
    return 2 * positions * inner * (2 * x[1] + math.prod(weight2[1:]))


register_flop_formula(_OPS.bottleneck_infer)(_of_block)
for _name, _shapes in _CONVOLUTIONS.items():
    register_flop_formula(getattr(_OPS, _name))(_formula(_shapes))
