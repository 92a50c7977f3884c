"""bn_act: normalise, add the residual, apply the ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.rows import STATS_ROWS
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_activations, check_vectors, laid_out, new_like


def check_residual(
    x: Tensor, residual: Tensor | None, residual_stats: Tensor | None, both: bool = False
) -> None:
    check_vectors(x, (STATS_ROWS, x.shape[1]), residual_stats=residual_stats)
    if residual is None and residual_stats is not None:
        raise ValueError("residual_stats needs a residual")
    if both and residual is not None and residual_stats is None:
        raise ValueError("residual needs residual_stats: without, its gradient is du")


def bn_act(
    x: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool
) -> Tensor:
    check_activations(x, stats, residual=residual)
    check_residual(x, residual, residual_stats)
    memory = layout(x)
    x, residual = laid_out(memory, x, residual)
    z = torch.empty_like(x, memory_format=memory)
    kernel("bn_act", x)(x, stats, residual, residual_stats, relu, z)
    return z


OPS = {
    # residual_stats: the residual goes through a batch norm of its own first
    "bn_act": Op(
        "(Tensor x, Tensor stats, Tensor? residual, Tensor? residual_stats, bool relu) -> Tensor",
        bn_act,
        lambda x, *_: new_like(x),
    ),
}
