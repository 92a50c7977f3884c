"""conv_fwd, conv_dgrad and conv_wgrad: convolutions with the batch norms on both sides in their pass.

1x1 without padding and 3x3 padded by 1, of stride 1 or 2. With ``stats`` (or ``x_stats``) the input is a
raw output that still has its batch norm and ReLU ahead of it. A gradient is given as ``du``, behind the
batch norm of the raw output ``y``: with ``y_stats`` and ``y_sums`` that batch norm's backward is still to
be done, with ``y_stats`` alone its statistics are fixed, without both ``du`` is y's own gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import plan
from fusedres.kernels.rows import STATS_ROWS, SUMS_ROWS
from fusedres.ops.bn_act import check_residual
from fusedres.ops.dispatch import kernel, layout
from fusedres.ops.tensors import Op, check_vectors, laid_out, new_stats, or_nothing


def shape_of(
    x: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int = 1,
    groups: int = 1,
    *,
    pending: bool,
    residual: bool = False,
) -> plan.Conv:
    """What the choice of a convolution's implementation depends on."""
    n, c, h, w = x.shape
    ieee = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    filters, _, side, _ = weight.shape
    return plan.Conv(n, c, h, w, filters, side, stride, dilation, groups, pending, ieee, residual)


def out_size(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def conv_fwd(
    x: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    filters, channels = check_weight(x, weight, stride)
    check_like(x, x.shape, residual=residual)
    check_vectors(x, (STATS_ROWS, channels), stats=stats)
    check_vectors(x, (filters,), norm_weight=norm_weight, norm_bias=norm_bias)
    check_residual(x, residual, residual_stats)
    if residual is not None and (stats is None or weight.shape[2] != 1 or stride != 1):
        raise ValueError("a residual needs stats, and a 1x1 convolution of stride 1")
    run = kernel("conv_fwd", x, shape_of(x, weight, stride, pending=stats is not None))
    memory = layout(x)
    x, residual, weight = laid_out(memory, x, residual, weight)
    y, y_stats, z = _outputs(x, residual, weight, stride, statistics)
    run(x, stats, residual, residual_stats, relu, weight, stride, norm_weight, norm_bias, eps, z, y, y_stats)
    return y, or_nothing(new_stats(x, 0), y_stats), or_nothing(x, z)


def _outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, stride: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, _, h, w = x.shape
    shape = (n, weight.shape[0], out_size(h, stride), out_size(w, stride))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    z = None if residual is None else torch.empty_like(x, memory_format=layout(x))
    return y, new_stats(x, shape[1]) if statistics else None, z


def conv_dgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    weight: Tensor,
    stride: int,
    height: int,
    width: int,
    add: Tensor | None,
    first: int,
    x: Tensor | None,
    x_stats: Tensor | None,
    relu: bool,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    n, channels = du.shape[0], weight.shape[1]
    dx = torch.empty((n, channels, height, width), dtype=du.dtype, device=du.device, memory_format=layout(du))
    check_weight(dx, weight, stride)
    _check_gradient(dx, du, y, y_stats, y_sums, weight, stride)
    check_like(dx, dx.shape, x=x)
    check_vectors(dx, (STATS_ROWS, channels), x_stats=x_stats)
    if (x is None) != (x_stats is None) or (sums and x is None):
        raise ValueError("x and x_stats must both be given, or neither and no sums")
    if add is not None:
        _check_add(dx, add, first)
    run = kernel("conv_dgrad", du, shape_of(dx, weight, stride, pending=x is not None))
    du, y, weight, add, x = laid_out(layout(du), du, y, weight, add, x)
    x_sums = x_stats.new_empty((SUMS_ROWS, channels)) if x_stats is not None and sums else None
    run(du, y, y_stats, y_sums, weight, stride, add, first, x, x_stats, relu, dx, x_sums)
    return dx, or_nothing(new_stats(dx, 0), x_sums)


def _check_add(dx: Tensor, add: Tensor, first: int) -> None:
    n, channels, h, w = dx.shape
    sizes = ((h, w), (out_size(h, 2), out_size(w, 2)))
    check_like(dx, add.shape, add=add)
    if add.dim() != 4 or add.shape[0] != n or tuple(add.shape[2:]) not in sizes:
        raise ValueError(f"add must be [{n}, C, {h}, {w}] or every second pixel of it, got {list(add.shape)}")
    if not 0 <= first <= add.shape[1] - channels:
        raise ValueError(f"add has no {channels} channels from {first} on, got {list(add.shape)}")


def conv_wgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    x: Tensor,
    x_stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
) -> Tensor:
    check_weight(x, weight, stride)
    _check_gradient(x, du, y, y_stats, y_sums, weight, stride)
    check_vectors(x, (STATS_ROWS, x.shape[1]), x_stats=x_stats)
    run = kernel("conv_wgrad", x, shape_of(x, weight, stride, pending=x_stats is not None))
    du, y, x = laid_out(layout(x), du, y, x)
    dweight = torch.empty_like(weight)
    run(du, y, y_stats, y_sums, x, x_stats, relu, stride, dweight)
    return dweight


def check_like(like: Tensor, shape: torch.Size, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None or (t.dtype is like.dtype and t.shape == shape and t.device == like.device):
            continue
        if t.dtype is not like.dtype:
            raise TypeError(f"{name} must be {like.dtype}, got {t.dtype}")
        raise ValueError(f"{name} must be {list(shape)} on {like.device}, got {list(t.shape)} on {t.device}")


def check_weight(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int]:
    """Filters and channels."""
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
        raise ValueError(
            f"weight must be [K, {x.shape[1]}, 1, 1] or [K, {x.shape[1]}, 3, 3], got {list(weight.shape)}"
        )
    check_like(x, weight.shape, weight=weight)
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    return weight.shape[0], weight.shape[1]


def _check_gradient(
    x: Tensor,
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    weight: Tensor,
    stride: int,
) -> None:
    n, _, h, w = x.shape
    filters = weight.shape[0]
    shape = torch.Size((n, filters, out_size(h, stride), out_size(w, stride)))
    check_like(x, shape, du=du, y=y)
    check_vectors(x, (STATS_ROWS, filters), y_stats=y_stats)
    check_vectors(x, (SUMS_ROWS, filters), y_sums=y_sums)
    if y_sums is not None and (y is None or y_stats is None):
        raise ValueError("y_sums needs y and y_stats")


def _fake_fwd(x, stats, residual, residual_stats, relu, weight, stride, g, b, eps, statistics):  # type: ignore[no-untyped-def]
    y, y_stats, z = _outputs(x, residual, weight, stride, statistics)
    return y, or_nothing(new_stats(x, 0), y_stats), or_nothing(x, z)


def _fake_dgrad(du, y, y_stats, y_sums, weight, stride, height, width, add, first, x, x_stats, relu, sums):  # type: ignore[no-untyped-def]
    shape = (du.shape[0], weight.shape[1], height, width)
    dx = torch.empty(shape, dtype=du.dtype, device=du.device, memory_format=layout(du))
    return dx, x_stats.new_empty((SUMS_ROWS, shape[1])) if sums else new_stats(dx, 0).new_empty(0)


OPS = {
    # with a residual the activation z = relu(x * scale + shift + residual) is an output too
    "conv_fwd": Op(
        "(Tensor x, Tensor? stats, Tensor? residual, Tensor? residual_stats, bool relu, Tensor weight,"
        " int stride, Tensor? norm_weight, Tensor? norm_bias, float eps, bool statistics)"
        " -> (Tensor y, Tensor y_stats, Tensor z)",
        conv_fwd,
        _fake_fwd,
    ),
    # add: a gradient of x by another way, its channels from ``first`` on; of every pixel, or of those at even
    # rows and columns. With x the result is the gradient behind the batch norm of x, with its sums if asked
    "conv_dgrad": Op(
        "(Tensor du, Tensor? y, Tensor? y_stats, Tensor? y_sums, Tensor weight, int stride, int height,"
        " int width, Tensor? add, int first, Tensor? x, Tensor? x_stats, bool relu, bool sums)"
        " -> (Tensor dx, Tensor x_sums)",
        conv_dgrad,
        _fake_dgrad,
    ),
    # weight: for the shape, the dtype and the layout of its gradient
    "conv_wgrad": Op(
        "(Tensor du, Tensor? y, Tensor? y_stats, Tensor? y_sums, Tensor x, Tensor? x_stats, bool relu,"
        " Tensor weight, int stride) -> Tensor",
        conv_wgrad,
        lambda du, y, y_stats, y_sums, x, x_stats, relu, weight, stride: torch.empty_like(weight),
    ),
}
