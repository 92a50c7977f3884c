"""A chain of convolutions, their batch norms and a shortcut as one autograd Function.

Between the convolutions flow values that are not written (``pending``), so what is kept for the backward is
the input, the raw outputs and the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import _ownership, ops
from fusedres.functional.autograd import differentiable_once, parameter_gradients
from fusedres.functional.batch_norm import BatchNorm
from fusedres.functional.bn_act import reduce
from fusedres.functional.pending import Added, Geometry, Pending, PendingGradient, served
from fusedres.functional.processes import Over

_OPS = torch.ops.fusedres


class ConvNorm(NamedTuple):
    """A convolution without bias, padded to keep the size at stride 1, and the batch norm behind it.

    Args:
        weight: [K, C / groups, R, R], R odd, dtype of the activations.
        norm: over K channels.
        stride: of both axes.
        dilation: of both axes.
        groups: as in :func:`torch.nn.functional.conv2d`.
    """

    weight: Tensor
    norm: BatchNorm
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.dilation, self.groups)


class Pad(NamedTuple):
    """The shortcut of option A (He et al. 2015, section 3.3): subsampling, and zeros for the new channels.

    Args:
        stride: of the subsampling, 1 or 2.
        before: zero channels ahead of the input's.
        after: zero channels behind them.
    """

    stride: int
    before: int
    after: int

    def of(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


# what is added at the end: nothing, the chain's input, that input (or another one) through the last of the
# convolutions, another tensor, or the input padded
Shortcut = Literal["none", "identity", "projection", "residual"] | Pad


class _Link(NamedTuple):
    """A convolution and its batch norm in the backward: what isn't a tensor."""

    geometry: Geometry
    over: Over
    dtypes: tuple[torch.dtype | None, torch.dtype | None]

    @classmethod
    def of(cls, conv: ConvNorm) -> _Link:
        weight, bias = conv.norm[:2]
        dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        return cls(conv.geometry, conv.norm.over, dtypes)


class _Conv(NamedTuple):
    """A convolution and its batch norm in the backward: its tensors, and which gradients are wanted."""

    geometry: Geometry
    over: Over
    weight: Tensor
    y: Tensor
    stats: Tensor
    source: Pending
    of_source: bool
    of_weight: bool
    of_norm: bool

    @property
    def of_y(self) -> bool:
        """Whether the raw output's gradient is wanted."""
        return self.of_source or self.of_weight

    @property
    def sums(self) -> bool:
        """Whether the sums over its channels are wanted."""
        return self.of_norm or (self.over.training and self.of_y)

    @property
    def fused(self) -> bool:
        """Whether a kernel of ours consumes the pending gradient."""
        return any(
            wanted and served(op, self.source, self.weight, self.geometry)
            for op, wanted in (("conv_wgrad", self.of_weight), ("conv_dgrad", self.of_source))
        )

    def pending(
        self, du: Tensor, sums: Tensor | None, *, relu: bool = False, owned: bool = False
    ) -> PendingGradient:
        through = self.over.through(sums, self.y)
        return PendingGradient(du, self.y, self.stats, through, relu=relu, owned=owned)


def run(
    x: Tensor, residual: Tensor | None, convs: Sequence[ConvNorm], shortcut: Shortcut, relu: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The output, and the raw output of each convolution with its vectors.

    ``residual`` is what is added, or, with a projection, what goes through that instead of ``x``.
    """
    raw: list[tuple[Tensor, Tensor]] = []
    flow = Pending(x)
    for conv in convs[:-1] if shortcut == "projection" else convs:
        raw.append(flow.convolve(conv.weight, conv.geometry, conv.norm))
        flow = Pending(*raw[-1], relu)
    y, stats = raw[-1]
    residual_stats = None
    if shortcut == "projection":
        source = Pending(x if residual is None else residual)
        raw.append(source.convolve(convs[-1].weight, convs[-1].geometry, convs[-1].norm))
        residual, residual_stats = raw[-1]
    elif isinstance(shortcut, Pad):
        residual = shortcut.of(x)
    elif shortcut == "identity":
        residual = x
    return _OPS.bn_act(y, stats, residual, residual_stats, relu), raw


class Chain(torch.autograd.Function):
    """Convolutions with their batch norms, the shortcut's add and the ReLU.

    Saved for backward: the input, the raw outputs with their per-channel vectors, the weights and, where a
    residual went through the ReLU, the output. Activations between the convolutions are computed again. The
    raw output that goes into that sum isn't kept where its batch norm is fixed: its gradient is the scale's
    alone, and the output stands for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        convs: Sequence[ConvNorm],
        shortcut: Shortcut,
        relu: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        """``parameters``: weight, and the batch norm's weight and bias, of each convolution in turn."""
        z, raw = run(x, residual, convs, shortcut, relu)
        ctx.links = tuple(map(_Link.of, convs))
        ctx.shortcut, ctx.relu, ctx.backend = shortcut, relu, ops.forced_backend()
        through_relu = relu and shortcut != "none"
        # a convolution right before the ReLU, whose mask is in z
        last = len(convs) - 1 - (shortcut == "projection") if through_relu else len(convs)
        tensors: list[Tensor | None] = []
        for i, (weight, (y, stats)) in enumerate(zip(parameters[::3], raw, strict=True)):
            of_norm = any(ctx.needs_input_grad[6 + 3 * i : 8 + 3 * i])
            fixed = not convs[i].norm.training and not of_norm
            tensors += [weight, z if i >= last and fixed else y, stats]
        projected = residual if shortcut == "projection" else None
        ctx.save_for_backward(x, projected, z if through_relu else None, *tensors)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        holders = _ownership.references(grad)
        return Chain._backward(ctx, grad, _ownership.owned(grad, holders))  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def _backward(ctx: Any, saved: Any, grad: Tensor, owned: bool) -> tuple[Tensor | None, ...]:
        x, projected, z, *tensors = saved
        of_x, of_residual, _, _, _, *of_parameters = ctx.needs_input_grad
        layout = ops.layout(x)
        if not grad.is_contiguous(memory_format=layout):
            grad, owned = grad.contiguous(memory_format=layout), True
        convs: list[_Conv] = []
        source, wanted = Pending(x), of_x
        for link, (weight, y, stats), (of_weight, *of_norm) in zip(
            ctx.links, _threes(tensors), _threes(of_parameters), strict=True
        ):
            if ctx.shortcut == "projection" and link is ctx.links[-1]:
                source, wanted = (
                    (Pending(x), of_x) if projected is None else (Pending(projected), of_residual)
                )
            conv = _Conv(link.geometry, link.over, weight, y, stats, source, wanted, of_weight, any(of_norm))
            convs.append(conv)
            source, wanted = Pending(y, stats, ctx.relu), conv.of_y or conv.of_norm
        gradients = _Gradients(convs, ctx.shortcut, ctx.relu)
        dx, dresidual = gradients.run(grad, owned, z, joined=projected is None)
        norms = parameter_gradients(
            gradients.sums,
            [n for needs in _threes(of_parameters) for n in needs[1:]],
            [dtype for link in ctx.links for dtype in link.dtypes],
        )
        parameters: list[Tensor | None] = []
        for dweight, dnorm in zip(gradients.weights, zip(norms[::2], norms[1::2], strict=True), strict=True):
            parameters += [dweight, *dnorm]
        return dx, dresidual if of_residual else None, None, None, None, *parameters


class FusedConvBNAct(Chain):
    """Named for profiles, as the following."""


class FusedBasicBlock(Chain):
    pass


class FusedBottleneck(Chain):
    pass


class FusedPlainBlock(Chain):
    pass


class _Gradients:
    """The backward of a chain, from its last convolution to its first.

    Args:
        convs: the convolutions, a projection last.
        shortcut: what is added.
        relu: between the convolutions and at the end.
    """

    def __init__(self, convs: list[_Conv], shortcut: Shortcut, relu: bool) -> None:
        self.convs, self.shortcut, self.relu = convs, shortcut, relu
        self.weights: list[Tensor | None] = [None] * len(convs)
        self.sums: list[Tensor | None] = [None] * len(convs)

    def run(
        self, grad: Tensor, owned: bool, z: Tensor | None, joined: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the input and of a residual of its own; fills ``weights`` and ``sums``.

        ``joined``: a projection has the chain's input.
        """
        projected = self.shortcut == "projection"
        last = len(self.convs) - 1 - projected
        conv = self.convs[last]
        branch = self.convs[-1] if projected else None
        of_branch = branch if branch is not None and branch.sums else None
        du, owned, relu, self.sums[last], branch_sums = reduce(
            grad,
            owned,
            conv.y,
            z,
            conv.stats,
            None if of_branch is None else of_branch.y,
            None if of_branch is None else of_branch.stats,
            self.relu,
            conv.sums or of_branch is not None,
        )
        add: Added | None = None
        if branch is None:
            gradient = conv.pending(du, self.sums[last], relu=relu, owned=owned and self.shortcut == "none")
            if isinstance(self.shortcut, Pad):
                add = Added(du, self.shortcut.before)
            elif self.shortcut == "identity":
                add = Added(du)
        else:
            self.sums[-1] = branch_sums
            gradient, other = _split(conv, branch, du, owned, self.sums[last], branch_sums)
            add = self._through_projection(branch, other)
            if not joined:
                return self._through_chain(gradient, last, None), None if add is None else add.gradient
        return self._through_chain(gradient, last, add), du

    def _through_projection(self, conv: _Conv, gradient: PendingGradient) -> Added | None:
        source, weight, geometry = conv.source, conv.weight, conv.geometry
        if conv.of_weight:
            self.weights[-1] = gradient.of_weight(source, weight, geometry)
        if not conv.of_source:
            return None
        if weight.shape[2] == 1 and geometry.stride == 2:
            # every second pixel went in: their gradient, as if there were no others. No value of theirs is
            # read, and their layout is the gradient's
            went_in = torch.empty_like(source.y[:, :, ::2, ::2], memory_format=ops.layout(source.y))
            source, geometry = Pending(went_in), geometry._replace(stride=1)
        return Added(gradient.of_source(source, weight, geometry).gradient)

    def _through_chain(self, gradient: PendingGradient, last: int, add: Added | None) -> Tensor | None:
        for i in range(last, 0, -1):
            conv, before = self.convs[i], self.convs[i - 1]
            if conv.of_weight:
                self.weights[i] = gradient.of_weight(conv.source, conv.weight, conv.geometry)
            if not conv.of_source:
                return None
            du, relu, self.sums[i - 1] = gradient.of_source(
                conv.source, conv.weight, conv.geometry, sums=before.sums
            )
            if not before.of_y:
                return None
            gradient = before.pending(du, self.sums[i - 1], relu=relu, owned=True)
        conv = self.convs[0]
        if conv.of_weight:
            self.weights[0] = gradient.of_weight(conv.source, conv.weight, conv.geometry)
        if not conv.of_source:
            return None
        return gradient.of_source(conv.source, conv.weight, conv.geometry, add=add).gradient


def _split(
    conv: _Conv,
    branch: _Conv,
    du: Tensor,
    owned: bool,
    sums: Tensor | None,
    branch_sums: Tensor | None,
) -> tuple[PendingGradient, PendingGradient]:
    """The gradients of the last convolution and of the projection: in one pass if both have to be written."""
    gradient, of_branch = conv.pending(du, sums), branch.pending(du, branch_sums)
    if conv.of_y and branch.of_y and not conv.fused and not branch.fused:
        arguments = (gradient.y, gradient.stats, gradient.sums, of_branch.y, of_branch.stats, of_branch.sums)
        if owned:
            other = _OPS.bn_act_backward_apply_(du, *arguments, False)
        else:
            du, other = _OPS.bn_act_backward_apply(du, *arguments, False)
        return PendingGradient(du), PendingGradient(other)
    return gradient, of_branch


def _threes(values: Sequence[Any]) -> list[Any]:
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))
