"""A chain of convolutions with a shortcut: its inputs, the run of a function on them, and its check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import functional
from fusedres.functional import BatchNorm, ConvNorm, Pad

# error of a gradient by a few values that passed a ReLU, or didn't, by rounding
FLIPPED = 0.1
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Kind(NamedTuple):
    """Channels, then filters, side and stride of each convolution, and what is added at the end."""

    channels: int
    convs: tuple[tuple[int, int, int], ...]
    shortcut: Any = None
    pooled: bool = False  # the projection gets another tensor, of half the size


KINDS = {
    "conv": Kind(16, ((24, 3, 2),)),
    "conv, residual": Kind(16, ((24, 1, 1),), "residual"),
    "plain": Kind(16, ((24, 3, 2), (24, 3, 1))),
    "basic": Kind(16, ((16, 3, 1), (16, 3, 1)), "identity"),
    "basic, projection": Kind(16, ((24, 3, 2), (24, 3, 1)), "projection"),
    "basic, padded": Kind(16, ((32, 3, 2), (32, 3, 1)), Pad(2, 8, 8)),
    "basic, padded by four": Kind(16, ((24, 3, 2), (24, 3, 1)), Pad(2, 4, 4)),
    "bottleneck": Kind(32, ((8, 1, 1), (8, 3, 1), (32, 1, 1)), "identity"),
    "bottleneck, projection of stride 1": Kind(16, ((8, 1, 1), (8, 3, 1), (32, 1, 1)), "projection"),
    "bottleneck, projection": Kind(16, ((8, 1, 1), (8, 3, 2), (32, 1, 1)), "projection"),
    "basic, pooled": Kind(16, ((24, 3, 2), (24, 3, 1)), "projection", pooled=True),
    "bottleneck, pooled": Kind(16, ((8, 1, 1), (8, 3, 2), (32, 1, 1)), "projection", pooled=True),
    "bottleneck, v1": Kind(16, ((8, 1, 2), (8, 3, 1), (32, 1, 1)), "projection"),
}


def call(x: Tensor, convs: list[ConvNorm], shortcut: Any, relu: bool, residual: Tensor | None) -> Tensor:
    """The public function for the kind."""
    if len(convs) == 1:
        return functional.conv_bn_act(x, *convs, residual=residual, relu=relu)
    if shortcut == "none":
        return functional.plain_block(x, *convs, relu=relu)
    if shortcut == "projection":
        *convs, shortcut = convs
    run = functional.basic_block if len(convs) == 2 else functional.bottleneck
    return run(x, *convs, None if shortcut == "identity" else shortcut, projected=residual, relu=relu)


def eager(x: Tensor, convs: list[ConvNorm], shortcut: Any, relu: bool, residual: Tensor | None) -> Tensor:
    """The same, operator by operator."""

    def norm_of(conv: ConvNorm, t: Tensor) -> Tensor:
        padding = conv.dilation * (conv.weight.shape[2] // 2)
        return conv.norm.plain(
            F.conv2d(t, conv.weight, None, conv.stride, padding, conv.dilation, conv.groups)
        )

    act = F.relu if relu else lambda t: t
    chain = convs[:-1] if shortcut == "projection" else convs
    out = x
    for conv in chain[:-1]:
        out = act(norm_of(conv, out))
    out = norm_of(chain[-1], out)
    if shortcut == "projection":
        out = out + norm_of(convs[-1], x if residual is None else residual)
    elif shortcut == "identity":
        out = out + x
    elif shortcut == "residual":
        out = out + residual
    elif isinstance(shortcut, Pad):
        subsampled = x[:, :, :: shortcut.stride, :: shortcut.stride]
        out = out + F.pad(subsampled, (0, 0, 0, 0, shortcut.before, shortcut.after))
    return act(out)


class ChainCase:
    """One set of inputs, in the precision of ``dtype`` and laid out as asked.

    Args:
        kind: of KINDS.
        size: N, H, W.
        training: of each batch norm in turn, a projection's last, the last one repeated; or of all.
        offset: added to the input.
        zero: the last batch norm's weight is 0 (zero_init_residual).
        frozen: names of results that have no gradient.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype,
        layout: str = "channels_last",
        *,
        size: tuple[int, int, int] = (3, 7, 6),
        relu: bool = True,
        training: bool | tuple[bool, ...] = True,
        affine: bool = True,
        offset: float = 0.0,
        zero: bool = False,
        frozen: tuple[str, ...] = (),
    ) -> None:
        self.dtype, self.memory, self.relu, self.frozen = dtype, LAYOUTS[layout], relu, frozen
        channels, shapes, shortcut, self.pooled = KINDS[kind]
        self.shortcut = "none" if shortcut is None else shortcut
        n, h, w = size
        self.x = self._activation(n, channels, h, w, offset)
        if shortcut == "projection":
            stride = 1 if self.pooled else max(stride for _, _, stride in shapes)
            shapes = (*shapes, (shapes[-1][0], 1, stride))
        self.convs = []
        before = channels
        for i, (filters, side, stride) in enumerate(shapes):
            if shortcut == "projection" and i == len(shapes) - 1:
                before = channels
            trained = training if isinstance(training, bool) else training[min(i, len(training) - 1)]
            self.convs.append(self._conv(before, filters, side, stride, trained, affine))
            before = filters
        if zero:
            last = -2 if shortcut == "projection" else -1
            self.convs[last].norm.weight.zero_()
        out = call(
            self.x.float(), [self._like(c, torch.float32) for c in self.convs], *self.rest(torch.float32)
        )
        self.grad = torch.randn(out.shape).to(dtype).to(memory_format=self.memory)

    def _activation(self, *shape: float) -> Tensor:
        *sizes, offset = shape
        return (torch.randn(*map(int, sizes)) + offset).to(self.dtype).to(memory_format=self.memory)

    def _conv(
        self, channels: int, filters: int, side: int, stride: int, training: bool, affine: bool
    ) -> ConvNorm:
        weight = torch.randn(filters, channels, side, side) / (channels * side * side) ** 0.5
        weight = weight.to(self.dtype).to(memory_format=self.memory)
        weights = (torch.rand(filters) + 0.5, torch.randn(filters)) if affine else (None, None)
        norm = BatchNorm(*weights, torch.randn(filters), torch.rand(filters) + 0.5, training)
        return ConvNorm(weight, norm, stride)

    def _like(self, conv: ConvNorm, dtype: torch.dtype) -> ConvNorm:
        wide = torch.promote_types(dtype, torch.float32)
        tensors = [None if t is None else t.to(wide, copy=True) for t in conv.norm[:4]]
        return conv._replace(
            weight=conv.weight.to(dtype, copy=True), norm=BatchNorm(*tensors, *conv.norm[4:])
        )

    def rest(self, dtype: torch.dtype) -> tuple[Any, bool, Tensor | None]:
        residual = None
        if self.shortcut == "residual" or self.pooled:
            n, channels, h, w = self.x.shape
            shape = (
                (channels, (h + 1) // 2, (w + 1) // 2) if self.pooled else (len(self.convs[-1].weight), h, w)
            )
            generator = torch.Generator().manual_seed(7)
            residual = torch.randn(n, *shape, generator=generator)
            residual = residual.to(self.dtype).to(dtype).to(memory_format=self.memory).requires_grad_()
        return self.shortcut, self.relu, residual

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The output, every gradient and the running statistics."""
        dtype = dtype or self.dtype
        x = self.x.detach().clone().to(dtype)
        convs = [self._like(conv, dtype) for conv in self.convs]
        shortcut, relu, residual = self.rest(dtype)
        leaves = {"dx": x, "dresidual": residual}
        for i, conv in enumerate(convs):
            leaves |= {
                f"dfilters{i}": conv.weight,
                f"dweight{i}": conv.norm.weight,
                f"dbias{i}": conv.norm.bias,
            }
        leaves = {name: t for name, t in leaves.items() if t is not None}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in self.frozen)
        out = function(x, convs, shortcut, relu, residual)
        out.backward(self.grad.to(dtype))
        results = {"out": out.detach()}
        for i, conv in enumerate(convs):
            results |= {f"mean{i}": conv.norm.running_mean, f"var{i}": conv.norm.running_var}
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name in self.frozen), name
            if leaf.grad is not None:
                results[name] = leaf.grad
        return results

    def check(self, times: float = 2) -> dict[str, Tensor]:
        """Every result within ``times`` PyTorch's own error, as root of the mean square.

        Not as the largest error: near 0 a ReLU may go either way, and then a value's whole gradient differs.
        In 16 bits that happens to a few of the thousands of values here, by luck to ours or to PyTorch's.
        """
        ours, theirs, reference = self.run(call), self.run(eager), self.run(eager, torch.float64)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape
            norm = reference[name].norm()
            error, allowed = ((t[name].double() - reference[name]).norm() for t in (ours, theirs))
            rounding = torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps
            allowed = times * allowed + rounding * norm
            if name.startswith("d") and self.dtype != torch.float32:
                allowed += FLIPPED * norm
            assert error <= allowed, f"{name} is off by {error / norm:.3g}, allowed {allowed / norm:.3g}"
        return ours
