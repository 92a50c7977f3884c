"""bn_act_backward_reduce and _apply: sums over all values of a channel, then gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.rows import SUMS_ROWS
from fusedres.ops.bn_act import check_residual
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import (
    Op,
    check_activations,
    check_vectors,
    laid_out,
    new_like,
    new_sums,
    or_nothing,
)


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_activations(x, stats, grad=grad, z=z, residual=residual)
    check_residual(x, residual, residual_stats, both=True)
    if relu and residual is not None and z is None:
        raise ValueError("z must be given where a residual went through the ReLU")
    if z is not None and not relu:
        raise ValueError("z is for the mask of a ReLU, and there is none")
    memory = layout(x)
    grad, x, z, residual = laid_out(memory, grad, x, z, residual)
    du = None if z is None else torch.empty_like(x, memory_format=memory)
    sums, residual_sums = new_sums(stats, residual_stats)
    kernel("bn_act_backward_reduce", x)(
        grad, x, z, stats, residual, residual_stats, relu, du, sums, residual_sums
    )
    return or_nothing(x, du), sums, or_nothing(sums, residual_sums)


def bn_act_backward_reduce_(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_activations(x, stats, grad=grad, z=z, residual=residual)
    check_residual(x, residual, residual_stats, both=True)
    memory = layout(x)
    _check_in_place(grad, memory)
    x, z, residual = laid_out(memory, x, z, residual)
    sums, residual_sums = new_sums(stats, residual_stats)
    kernel("bn_act_backward_reduce", x)(
        grad, x, z, stats, residual, residual_stats, True, grad, sums, residual_sums
    )
    return sums, or_nothing(sums, residual_sums)


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    _check_apply(grad, x, stats, sums, residual, residual_stats, residual_sums, relu)
    memory = layout(x)
    grad, x, residual = laid_out(memory, grad, x, residual)
    dx = torch.empty_like(x, memory_format=memory)
    dresidual = None if residual is None else torch.empty_like(x, memory_format=memory)
    kernel("bn_act_backward_apply", x)(
        grad, x, stats, sums, residual, residual_stats, residual_sums, relu, dx, dresidual
    )
    return dx, or_nothing(x, dresidual)


def bn_act_backward_apply_(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
) -> Tensor:
    _check_apply(grad, x, stats, sums, residual, residual_stats, residual_sums, relu)
    memory = layout(x)
    _check_in_place(grad, memory)
    x, residual = laid_out(memory, x, residual)
    dresidual = None if residual is None else torch.empty_like(x, memory_format=memory)
    kernel("bn_act_backward_apply", x)(
        grad, x, stats, sums, residual, residual_stats, residual_sums, relu, grad, dresidual
    )
    return or_nothing(x, dresidual)


def _check_apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
) -> None:
    check_activations(x, stats, grad=grad, residual=residual)
    check_residual(x, residual, residual_stats, both=True)
    check_vectors(x, (SUMS_ROWS, x.shape[1]), sums=sums, residual_sums=residual_sums)
    if residual is not None and relu:
        raise ValueError("relu must be False with a residual: grad is behind the ReLU already")


def _check_in_place(grad: Tensor, memory: torch.memory_format) -> None:
    if not grad.is_contiguous(memory_format=memory):
        raise ValueError(
            f"grad is written over, so it must be in the layout of x, {memory}, got {grad.stride()}"
        )


def _nothing_or_like(like: Tensor, t: Tensor | None) -> Tensor:
    return like.new_empty(0) if t is None else new_like(like)


def _fake_sums(stats: Tensor, residual_stats: Tensor | None) -> tuple[Tensor, Tensor]:
    sums, residual_sums = new_sums(stats, residual_stats)
    return sums, or_nothing(sums, residual_sums)


OPS = {
    # z is the stored output, given where a residual went into it: then du is written as well. The residual
    # is given where it has statistics of its own: then its sums are written as well
    "bn_act_backward_reduce": Op(
        "(Tensor grad, Tensor x, Tensor? z, Tensor stats, Tensor? residual, Tensor? residual_stats,"
        " bool relu) -> (Tensor du, Tensor sums, Tensor residual_sums)",
        bn_act_backward_reduce,
        lambda grad, x, z, stats, r, r_stats, relu: (_nothing_or_like(x, z), *_fake_sums(stats, r_stats)),
    ),
    "bn_act_backward_reduce_": Op(
        "(Tensor(a!) grad, Tensor x, Tensor z, Tensor stats, Tensor? residual, Tensor? residual_stats)"
        " -> (Tensor sums, Tensor residual_sums)",
        bn_act_backward_reduce_,
        lambda grad, x, z, stats, r, r_stats: _fake_sums(stats, r_stats),
    ),
    "bn_act_backward_apply": Op(
        "(Tensor grad, Tensor x, Tensor stats, Tensor? sums, Tensor? residual, Tensor? residual_stats,"
        " Tensor? residual_sums, bool relu) -> (Tensor dx, Tensor dresidual)",
        bn_act_backward_apply,
        lambda grad, x, stats, sums, r, *_: (new_like(x), _nothing_or_like(x, r)),
    ),
    "bn_act_backward_apply_": Op(
        "(Tensor(a!) grad, Tensor x, Tensor stats, Tensor? sums, Tensor? residual, Tensor? residual_stats,"
        " Tensor? residual_sums, bool relu) -> Tensor",
        bn_act_backward_apply_,
        lambda grad, x, stats, sums, r, *_: _nothing_or_like(x, r),
    ),
}
