"""The residual blocks as modules, and the glue from nn.BatchNorm2d, nn.ReLU children to ``bn_act``.

A block has the children, the names and the parameters of torchvision's. Its convolutions run by
module call; a batch norm, the residual add behind it and the activation run as one fused
:func:`fusedres.functional.bn_act` wherever that changes nothing, else child by child.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fusedres import functional

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PadShortcut",
    "PlainBlock",
    "TraceForScript",
    "batch_norm_act",
    "shortcut",
    "unfused_reason",
]

Variant = Literal["v1.5", "v1"]
Zeros = Literal["end", "split"]
NormLayer = Callable[..., nn.Module]

_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = (*_PLAIN, type(None))


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the argument ``name`` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_frozen(norm: nn.Module) -> bool:
    # by name: importing torchvision takes a second, and who has such a module has imported it
    kind = type(norm)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def _altered(child: nn.Module) -> str | None:
    """Why calling ``child`` does more than its class's forward; None if it doesn't."""
    if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
        return "has a hook"
    if "forward" in child.__dict__:
        return "has a forward of its own"
    if child._compiled_call_impl is not None:
        return "was compiled by itself"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "is under a global module hook"
    return None


def _traced(x: Tensor) -> str | None:
    """Why children have to be called one by one for ``x``, whatever they are; None if they needn't."""
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit is tracing"
    if torch._C._are_functorch_transforms_active():
        return "torch.func is transforming the call"
    return None


def _tensors(norm: nn.Module) -> tuple[Any, ...]:
    """weight, bias, running mean and variance, past nn.Module's slow way to an attribute.

    Something that is no tensor stands for one that isn't where its class puts it.
    """
    parameters: dict[str, Any] = norm._parameters if type(norm) is nn.BatchNorm2d else norm._buffers
    buffers = norm._buffers
    return (
        parameters.get("weight", norm),
        parameters.get("bias", norm),
        buffers.get("running_mean", norm),
        buffers.get("running_var", norm),
    )


def unfused_reason(
    norm: nn.Module, act: nn.Module | None, x: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """Why ``norm``, the residual add and ``act`` can't run as one fused ``bn_act``; None if they can.

    Args:
        norm: the normalisation, fused if it is exactly an nn.BatchNorm2d or torchvision's
            FrozenBatchNorm2d.
        act: the activation behind it, fused if it is exactly an nn.ReLU or nn.Identity; None for none.
        x: [N, C, H, W], what ``norm`` is about to be called on; None to look at the modules alone.
        residual: [N, C, H, W], what is added in between.
    """
    frozen = type(norm) is not nn.BatchNorm2d
    if frozen and not _is_frozen(norm):
        return f"the norm is a {type(norm).__name__}, not an nn.BatchNorm2d or FrozenBatchNorm2d"
    why = _altered(norm)
    if why is not None:
        return f"the norm {why}"
    if act is not None:
        if type(act) is not nn.ReLU and type(act) is not nn.Identity:
            return f"the activation is a {type(act).__name__}, not an nn.ReLU or nn.Identity"
        why = _altered(act)
        if why is not None:
            return f"the activation {why}"
    if x is not None:
        # before a parameter is read, which fx would record
        why = _traced(x)
        if why is not None:
            return why
    weight, bias, mean, var = _tensors(norm)
    if not (
        type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(var) in _PLAIN_OR_NONE
    ):
        return "the norm's parameters or buffers aren't plain tensors"
    if x is None:
        return None
    if x.dim() != 4:
        return f"the input is {x.dim()}D"
    if frozen and weight.dtype != x.dtype:
        return f"FrozenBatchNorm2d promotes {x.dtype} with its {weight.dtype} buffers"
    if residual is not None and not (
        type(residual) in _PLAIN
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
    ):
        return "the residual differs from the input in kind, dtype, shape or device"
    return None


def _fused(norm: Any, relu: bool, x: Tensor, residual: Tensor | None) -> Tensor:
    """``functional.bn_act`` with the arguments that ``norm``'s own forward would give F.batch_norm."""
    weight, bias, mean, var = _tensors(norm)
    training, momentum = False, None
    if type(norm) is nn.BatchNorm2d:
        training, momentum = norm.training, norm.momentum
        if training and not norm.track_running_stats:
            mean = var = None
        elif training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        training = training or (mean is None and var is None)
    return functional.bn_act(
        x,
        weight,
        bias,
        mean,
        var,
        residual=residual,
        relu=relu,
        training=training,
        momentum=0.0 if momentum is None else momentum,
        eps=norm.eps,
    )


def batch_norm_act(
    norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``act(norm(x) + residual)``: fused where :func:`unfused_reason` finds nothing against it.

    Otherwise the children are called one after the other, as torchvision's blocks do it.

    Args:
        norm: a batch norm; anything else is called.
        act: the activation; None for none.
        x: [N, C, H, W], bf16 | fp16 | fp32, channels_last or NCHW.
        residual: [N, C, H, W], the shortcut's output, or None.

    Returns:
        [N, C, H, W], dtype of x.
    """
    if unfused_reason(norm, act, x, residual) is None:
        return _fused(norm, type(act) is nn.ReLU, x, residual)
    out: Tensor = norm(x)
    if residual is not None:
        out += residual
    return out if act is None else act(out)


def shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """The shortcut of a block: x itself, or ``downsample(x)`` with its batch norm fused.

    Args:
        downsample: None for an identity; of an nn.Sequential of two children the second may be fused.
        x: [N, C, H, W], the block's input.
    """
    if downsample is None:
        return x
    if (
        type(downsample) is nn.Sequential
        and len(downsample) == 2
        and _altered(downsample) is None
        and _traced(x) is None
    ):
        conv, norm = downsample
        return batch_norm_act(norm, None, conv(x))
    return downsample(x)  # type: ignore[no-any-return]


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


class PadShortcut(nn.Module):
    """Option A of He et al. 2015, section 3.3: subsampling, and zeros for the new channels.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the subsampling.
        zeros: "end" puts the zero channels behind the input's, "split" half of them on either side.

    Shapes:
        [N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]

    Raises:
        ValueError: an unknown ``zeros``, or fewer channels out than in.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, zeros: Zeros = "end") -> None:
        super().__init__()
        one_of("zeros", zeros, ("end", "split"))
        if planes < inplanes:
            raise ValueError(f"planes must be at least inplanes, {inplanes}, got {planes}")
        self.stride = stride
        before = (planes - inplanes) // 2 if zeros == "split" else 0
        self.padding = (before, planes - inplanes - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"


class BasicBlock(TraceForScript):
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

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm_act(self.bn1, self.relu, self.conv1(x))
        out = self.conv2(out)
        return batch_norm_act(self.bn2, self.relu, out, shortcut(self.downsample, x))


class PlainBlock(BasicBlock):
    """A basic block without its shortcut: the plain nets of He et al. 2015, section 3.3."""

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm_act(self.bn1, self.relu, self.conv1(x))
        return batch_norm_act(self.bn2, self.relu, self.conv2(out))


class Bottleneck(TraceForScript):
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

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm_act(self.bn1, self.relu, self.conv1(x))
        out = batch_norm_act(self.bn2, self.relu, self.conv2(out))
        out = self.conv3(out)
        return batch_norm_act(self.bn3, self.relu, out, shortcut(self.downsample, x))
