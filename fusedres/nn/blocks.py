"""The residual blocks as modules, with the children, the names and the parameters of torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fusedres.nn.casts import convolve
from fusedres.nn.chain import Pairs, fused_chain, growth_by, is_small, unfused_chain_reason
from fusedres.nn.fuse import altered, batch_norm_act, copied_statistics
from fusedres.nn.shortcut import one_of, shortcut

Variant = Literal["v1.5", "v1"]
NormLayer = Callable[..., nn.Module]


class TraceForScript(nn.Module):
    """A module that torch.jit.script gets as its torch.fx trace: the plain calls of its children."""

    def __prepare_scriptable__(self) -> nn.Module:
        traced = torch.fx.symbolic_trace(self)
        for node in traced.graph.nodes:
            node.type = None  # an annotation kept as a string is no type to TorchScript
        traced.recompile()
        return traced


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        inplanes, planes, 3, stride, padding=dilation, groups=groups, dilation=dilation, bias=False
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class Residual:
    """The forward of a residual block, for a module with ``pairs``, ``relu`` and ``downsample``."""

    pairs: Pairs
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        pairs, relu, downsample = self.pairs, block._modules["relu"], self.downsample
        if is_small(x, growth_by(downsample)) and type(pairs[0][1]) is not nn.SyncBatchNorm:
            act = torch.relu_ if type(relu) is nn.ReLU and altered(relu) is None else relu
            if torch._C._current_graph_task_id() == -1:
                return _child_by_child(pairs, act, downsample, x)
            with copied_statistics(self):  # repeated, inside the backward of activation checkpointing
                return _child_by_child(pairs, act, downsample, x)
        fused = fused_chain(pairs, relu, x, downsample)
        if fused is not None:
            return fused
        *before, (conv, norm) = pairs
        out = x
        for inner, inner_norm in before:
            out = batch_norm_act(inner_norm, relu, convolve(inner, out))
        return batch_norm_act(norm, relu, convolve(conv, out), *shortcut(downsample, x))

    def unfused_reason(self) -> str | None:
        """Why the block doesn't run as one Function, whatever its input; None if it does."""
        return unfused_chain_reason(self.pairs, self.relu, self.downsample)


def _child_by_child(
    pairs: Pairs, act: Callable[[Tensor], Tensor], downsample: nn.Module | None, x: Tensor
) -> Tensor:
    """As torchvision's blocks do it, in their order.

    Call by call, so that what a call read is free when the next one asks for memory: it is in the cache.
    """
    *before, (conv, norm) = pairs
    out = x
    for inner, inner_norm in before:
        out = inner(out)
        out = inner_norm(out)
        out = act(out)
    out = conv(out)
    out = norm(out)
    out += x if downsample is None else downsample(x)
    return act(out)


def basic_pairs(block: Any) -> Pairs:
    """The convolutions of a basic block, each with the norm behind it."""
    of = block._modules  # nn.Module's own way to a child is slow beside a small block's operators
    return ((of["conv1"], of["bn1"]), (of["conv2"], of["bn2"]))


def bottleneck_pairs(block: Any) -> Pairs:
    """The convolutions of a bottleneck, each with the norm behind it."""
    of = block._modules
    return ((of["conv1"], of["bn1"]), (of["conv2"], of["bn2"]), (of["conv3"], of["bn3"]))


class BasicBlock(Residual, TraceForScript):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left).

    Args:
        inplanes: channels of the input.
        planes: channels of both convolutions.
        stride: of the first convolution and, through ``downsample``, of the shortcut.
        downsample: the shortcut; None for an identity.
        groups: 1.
        base_width: 64.
        dilation: 1.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d by default.
        variant: as in :class:`Bottleneck`, without a difference here.

    Shapes:
        [N, inplanes, H, W] -> [N, planes, H / stride, W / stride]

    Raises:
        ValueError: groups, base_width or dilation other than those, or an unknown variant.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        variant: Variant = "v1.5",
    ) -> None:
        super().__init__()
        one_of("variant", variant, tuple(Bottleneck.strided))
        for name, value, needed in (
            ("groups", groups, 1),
            ("base_width (width_per_group)", base_width, 64),
            ("dilation (replace_stride_with_dilation)", dilation, 1),
        ):
            if value != needed:
                raise ValueError(f"{name} must be {needed} in a net of basic blocks, got {value}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    pairs = property(basic_pairs)


class PlainBlock(BasicBlock):
    """A basic block without its shortcut: the plain nets of He et al. 2015, section 3.3."""

    def forward(self, x: Tensor) -> Tensor:
        fused = fused_chain(self.pairs, self.relu, x, shortcut=False)
        if fused is not None:
            return fused
        out = batch_norm_act(self.bn1, self.relu, convolve(self.conv1, x))
        return batch_norm_act(self.bn2, self.relu, convolve(self.conv2, out))

    def unfused_reason(self) -> str | None:
        return unfused_chain_reason(self.pairs, self.relu)


class Bottleneck(Residual, TraceForScript):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    Args:
        inplanes: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of the block.
        downsample: the shortcut; None for an identity.
        groups: of the 3x3 convolution (ResNeXt).
        base_width: channels per group where ``planes`` is 64 (wide ResNet).
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d by default.
        variant: "v1.5" has the stride on the 3x3 convolution, "v1", the paper's, on the first 1x1.

    Shapes:
        [N, inplanes, H, W] -> [N, 4 * planes, H / stride, W / stride]

    Raises:
        ValueError: an unknown variant.
    """

    expansion: ClassVar[int] = 4
    # variant -> the convolution that has the stride
    strided: ClassVar[dict[str, str]] = {"v1.5": "conv2", "v1": "conv1"}

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        variant: Variant = "v1.5",
    ) -> None:
        super().__init__()
        one_of("variant", variant, tuple(self.strided))
        norm_layer = norm_layer or nn.BatchNorm2d
        strides = {"conv1": 1, "conv2": 1, self.strided[variant]: stride}
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width, strides["conv1"])
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, strides["conv2"], groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    pairs = property(bottleneck_pairs)


def unfused_block_reason(block: nn.Module) -> str | None:
    """Why a residual block doesn't run as one Function, whatever its input; None if it does, or is none."""
    return block.unfused_reason() if isinstance(block, Residual) else None
