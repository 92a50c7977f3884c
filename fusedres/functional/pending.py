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

from fusedres import ops
from fusedres.functional.batch_norm import BatchNorm

_OPS = torch.ops.fusedres


class Geometry(NamedTuple):
    """What a convolution's weight doesn't tell: padding keeps the size at stride 1."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def padding(self, weight: Tensor) -> int:
        return self.dilation * (weight.shape[2] // 2)


def served(op: str, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a kernel of ours runs the convolution ``op`` of ``x``."""
    shape = ops.conv_shape(x, weight, *geometry)
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
        if served("conv_fwd", self.y, weight, geometry):
            vectors = norm.vectors(self.y)
            y, stats, _ = _OPS.conv_fwd(
                *(self.y, self.stats, None, None, self.relu, weight, geometry.stride),
                *(*vectors, norm.eps, norm.training),
            )
            if norm.training:
                norm.update(stats, y.numel() // y.shape[1])
                return y, stats
        else:
            y = F.conv2d(
                self.value(),
                weight,
                None,
                geometry.stride,
                geometry.padding(weight),
                geometry.dilation,
                geometry.groups,
            )
            y = y.contiguous(memory_format=ops.layout(y))
        return y, norm.stats(y)


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

    def of_weight(self, source: Pending, weight: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of the weight that met ``source``."""
        if served("conv_wgrad", source.y, weight, geometry):
            return _OPS.conv_wgrad(*self._operands(), *source, weight, geometry.stride)  # type: ignore[no-any-return]
        return _aten(self.value(), source.value(), weight, geometry, 1)

    def of_input(self, x: Tensor, weight: Tensor, geometry: Geometry, add: Added | None) -> Tensor:
        """The gradient of the input ``x``, and of what else it went to."""
        if served("conv_dgrad", x, weight, geometry):
            more = (None, 0) if add is None else add.for_kernel()
            dx, _ = _OPS.conv_dgrad(
                *(*self._operands(), weight, geometry.stride, *x.shape[2:]),
                *(*more, None, None, False, False),
            )
            return dx  # type: ignore[no-any-return]
        dx = _aten(self.value(), x, weight, geometry, 0)
        return dx if add is None else add.to(dx)

    def of_pending(
        self, source: Pending, weight: Tensor, geometry: Geometry, sums: bool
    ) -> tuple[Tensor, bool, Tensor | None]:
        """The gradient behind the batch norm that ``source`` is made by, and if asked its sums.

        The flag in between says that the ReLU's mask is still to be applied to the gradient.
        """
        y, stats, relu = source
        if served("conv_dgrad", y, weight, geometry):
            du, of_y = _OPS.conv_dgrad(
                *(*self._operands(), weight, geometry.stride, *y.shape[2:]),
                *(None, 0, y, stats, relu, sums),
            )
            return du, False, of_y if sums else None
        du = _aten(self.value(), y, weight, geometry, 0).contiguous(memory_format=ops.layout(y))
        if not sums:
            return du, relu, None
        return du, relu, _OPS.bn_act_backward_reduce(du, y, None, stats, None, None, relu)[1]


class Added(NamedTuple):
    """A gradient that came by the shortcut: channels of ``gradient`` from ``first`` on.

    Of every pixel, or of those at even rows and columns, whatever its size says.
    """

    gradient: Tensor
    first: int = 0

    def for_kernel(self) -> tuple[Tensor, int]:
        # its loads are 16 bytes wide
        if self.first % 8 == 0 and self.gradient.shape[1] % 8 == 0:
            return self
        return self.gradient[:, self.first :].contiguous(memory_format=torch.channels_last), 0

    def to(self, dx: Tensor) -> Tensor:
        more = self.gradient[:, self.first : self.first + dx.shape[1]]
        place = dx if more.shape[2:] == dx.shape[2:] else dx[:, :, ::2, ::2]
        place.add_(more)
        return dx


def _aten(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """PyTorch's gradient of the input (0) or the weight (1)."""
    stride, dilation, groups = geometry
    padding = geometry.padding(weight)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        *(dy, x, weight, None, [stride, stride], [padding, padding], [dilation, dilation]),
        *(False, [0, 0], groups, [which == 0, which == 1, False]),
    )[which]
