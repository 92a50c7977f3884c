"""The registered ops: schemas, fakes, and the way from a call to a kernel.

Nothing else knows torch.library. An op's arithmetic lives in ``kernels``; ``plan`` says which
implementation serves a call. Here tensors are checked, brought into one memory layout, and the
outputs allocated, so that an implementation only computes.

``stats`` is [5, C] with the rows mean, biased variance, rstd, scale, shift; ``sums`` is [4, C] with
the rows dbias, dweight, slope, offset (see ``kernels/rows.py``). Both are float32 (float64 for a
float64 activation).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedres.ops import (
    bias_relu_maxpool,
    bn_act,
    bn_act_backward,
    bn_relu_maxpool,
    bn_stats,
    bottleneck_infer,
    cast_weights,
    conv,
    conv_bias_act,
    conv_int8,
    global_avg_pool,
    quantize_int8,
    stem,
)
from fusedres.ops.bottleneck_infer import shape_of as bottleneck_shape
from fusedres.ops.conv import shape_of as conv_shape
from fusedres.ops.dispatch import backend, candidates, choice, forced_backend, layout, served, served_from
from fusedres.ops.stem import shape_of as stem_shape
from fusedres.ops.tensors import Op, stats_dtype

__all__ = [
    "OPS",
    "backend",
    "bottleneck_shape",
    "candidates",
    "choice",
    "conv_shape",
    "forced_backend",
    "layout",
    "served",
    "served_from",
    "stats_dtype",
    "stem_shape",
]

OPS: dict[str, Op] = {
    name: op
    for module in (
        bn_stats,
        bn_act,
        bn_act_backward,
        bn_relu_maxpool,
        bias_relu_maxpool,
        global_avg_pool,
        cast_weights,
        conv,
        conv_bias_act,
        bottleneck_infer,
        conv_int8,
        quantize_int8,
        stem,
    )
    for name, op in module.OPS.items()
}


def _require_grad(values: Iterable[Any]) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, list) and _require_grad(value)
        for value in values
    )


def _underived(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` where nobody wants a derivative: PyTorch would take one of an op that has none for zero."""

    @functools.wraps(run)
    def refusing(*args: Any) -> Any:
        if torch.is_grad_enabled() and _require_grad(args):
            raise RuntimeError(f"fusedres::{name} has no derivative, the functions of fusedres.functional do")
        if forward_ad._current_level >= 0:  # torch.func.jvp's, too, where the tangents can't be seen here
            raise NotImplementedError(f"fusedres::{name} has no forward-mode derivative")
        return run(*args)

    return refusing


_library: Any = torch.library.Library("fusedres", "DEF")  # type: ignore[no-untyped-call]
for _name, _op in OPS.items():
    _library.define(_name + _op.schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _underived(_name, _op.run), _key)
    torch.library.register_fake(f"fusedres::{_name}", _op.fake, lib=_library)
