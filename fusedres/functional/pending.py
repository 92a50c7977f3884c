"""Values that flow between convolutions without having been written.

A convolution consumes a :class:`Pending` and leaves the raw output of the next one; backward it consumes a
:class:`PendingGradient`. A kernel of ours does the batch norm on the way, in its prologue; for PyTorch's
convolutions the value is written first. So both kinds mix, each convolution by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import autotune, ops, plan
from fusedres.functional.batch_norm import BatchNorm

_OPS = torch.ops.fusedres


class Geometry(NamedTuple):
    """What a convolution's weight doesn't tell: padding keeps the size at stride 1."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def padding(self, weight: Tensor) -> int:
        return self.dilation * (weight.shape[2] // 2)


def shape_of(source: Pending, weight: Tensor, geometry: Geometry) -> plan.Conv:
    return ops.conv_shape(source.y, weight, *geometry, pending=source.stats is not None)


def served(op: str, source: Pending, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a kernel of ours runs the convolution ``op`` of ``source``, as far as is known."""
    x, shape = source.y, shape_of(source, weight, geometry)
    return ops.served(op, x.device, x.dtype, ops.forced_backend(), shape)


class Pending(NamedTuple):
    """relu(y * scale + shift), an activation that has not been written; y itself without stats."""

    y: Tensor
    stats: Tensor | None = None
    relu: bool = False

    def value(self) -> Tensor:
        if self.stats is None:
            return self.y
        return _OPS.bn_act(self.y, self.stats, None, None, self.relu)  # type: ignore[no-any-return]

    def convolve(self, weight: Tensor, geometry: Geometry, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        """The raw output and the per-channel vectors that normalise it; updates the running ones."""
        vectors = norm.vectors(self.y)

        def run(fused: bool) -> tuple[Tensor, Tensor | None]:
            if fused:
                y, stats, _ = _OPS.conv_fwd(
                    *(self.y, self.stats, None, None, self.relu, weight, geometry.stride),
                    *(*vectors, norm.eps, norm.training),
                )
                return y, stats
            stride, dilation, groups = geometry
            y = F.conv2d(self.value(), weight, None, stride, geometry.padding(weight), dilation, groups)
            y = y.contiguous(memory_format=ops.layout(y))
            return y, _OPS.bn_stats(y, *vectors, norm.eps) if norm.training else None

        y, stats = run(autotune.fused("conv_fwd", self.y, shape_of(self, weight, geometry), run))
        if stats is None or not norm.training:
            return y, norm.stats(y)
        return y, norm.update(stats, y.numel() // y.shape[1])


class SourceGradient(NamedTuple):
    """The gradient behind the batch norm that a source still had ahead, or of a source that had none.

    With ``relu`` the ReLU's mask is still to be applied. ``sums`` are over the channels, if asked.
    """

    gradient: Tensor
    relu: bool = False
    sums: Tensor | None = None


class PendingGradient:
    """The gradient of a raw output, not yet written: that behind its batch norm, and what is left to do.

    Args:
        du: [N, K, P, Q], the gradient behind the batch norm; with ``relu`` its mask is still to be applied.
        y: [N, K, P, Q], the raw output; None if ``du`` is its gradient.
        stats: [5, K].
        sums: [4, K]; None for fixed statistics.
        relu: as above.
        owned: whether ``du`` may be written over.
    """

    def __init__(
        self,
        du: Tensor,
        y: Tensor | None = None,
        stats: Tensor | None = None,
        sums: Tensor | None = None,
        *,
        relu: bool = False,
        owned: bool = False,
    ) -> None:
        self.du, self.y, self.stats, self.sums = du, y, stats, sums
        self.relu, self.owned = relu, owned

    def value(self) -> Tensor:
        """The gradient itself, written; from then on this is a plain tensor."""
        if self.stats is None:
            return self.du
        arguments = (self.y, self.stats, self.sums, None, None, None, self.relu)
        if self.owned:
            _OPS.bn_act_backward_apply_(self.du, *arguments)
        else:
            self.du, _ = _OPS.bn_act_backward_apply(self.du, *arguments)
        self.y = self.stats = self.sums = None
        self.relu, self.owned = False, True
        return self.du

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if self.relu:  # no prologue has a mask
            self.value()
        return self.du, self.y, self.stats, self.sums

    def _unowned(self) -> PendingGradient:
        """The same, to be run through without a trace."""
        return PendingGradient(self.du, self.y, self.stats, self.sums, relu=self.relu)

    def of_weight(self, source: Pending, weight: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weight that met ``source``."""

        def run(fused: bool, gradient: PendingGradient) -> Tensor:
            if fused:
                return _OPS.conv_wgrad(*gradient._operands(), *source, weight, geometry.stride)  # type: ignore[no-any-return]
            return _aten(gradient.value(), source.value(), weight, geometry, 1)

        shape = shape_of(source, weight, geometry)
        fused = autotune.fused("conv_wgrad", source.y, shape, lambda f: run(f, self._unowned()))
        return run(fused, self)

    def of_source(
        self,
        source: Pending,
        weight: Tensor,
        geometry: Geometry,
        *,
        add: Added | None = None,
        sums: bool = False,
    ) -> SourceGradient:
        """The gradient of ``source``, with ``add``, what came by another way."""
        x, stats, relu = source

        def run(fused: bool, gradient: PendingGradient) -> SourceGradient:
            if fused:
                more = (None, 0) if add is None else add.for_kernel(x.shape[1])
                behind = (None, None, False, False) if stats is None else (x, stats, relu, sums)
                dx, of_x = _OPS.conv_dgrad(
                    *gradient._operands(), weight, geometry.stride, *x.shape[2:], *more, *behind
                )
                return SourceGradient(dx, sums=of_x if sums else None)
            dx = _aten(gradient.value(), x, weight, geometry, 0)
            dx = dx.contiguous(memory_format=ops.layout(x))
            if add is not None:
                add.to(dx)
            if stats is None or not sums:
                return SourceGradient(dx, relu and stats is not None)
            reduced = _OPS.bn_act_backward_reduce(dx, x, None, stats, None, None, relu)
            return SourceGradient(dx, relu, reduced[1])

        shape = shape_of(source, weight, geometry)
        fused = autotune.fused("conv_dgrad", x, shape, lambda f: run(f, self._unowned()))
        return run(fused, self)


class Added(NamedTuple):
    """A gradient that came by the shortcut: channels of ``gradient`` from ``first`` on.

    Of every pixel, or of those at even rows and columns, whatever its size says.
    """

    gradient: Tensor
    first: int = 0

    def of(self, channels: int) -> Tensor:
        return self.gradient[:, self.first : self.first + channels]

    def for_kernel(self, channels: int) -> tuple[Tensor, int]:
        # its loads are 16 bytes wide
        if self.first % 8 == 0 and self.gradient.shape[1] % 8 == 0:
            return self
        return self.of(channels).contiguous(memory_format=torch.channels_last), 0

    def to(self, dx: Tensor) -> None:
        more = self.of(dx.shape[1])
        place = dx if more.shape[2:] == dx.shape[2:] else dx[:, :, ::2, ::2]
        place.add_(more)


def _aten(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """PyTorch's gradient of the input (0) or the weight (1)."""
    stride, dilation, groups = geometry
    padding = geometry.padding(weight)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        *(dy, x, weight, None, [stride, stride], [padding, padding], [dilation, dilation]),
        *(False, [0, 0], groups, [which == 0, which == 1, False]),
    )[which]
