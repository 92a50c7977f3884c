"""ResNet-18 to 152 for ImageNet: He et al. 2015, table 1, with torchvision's names and parameters."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fusedres.nn import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    PadShortcut,
    PlainBlock,
    TraceForScript,
    Variant,
    Zeros,
    cast_weights,
    conv1x1,
    global_avg_pool,
    one_of,
    stem,
)

Shortcut = Literal["A", "B", "C"]
Block = type[BasicBlock] | type[Bottleneck]


def make_shortcut(
    kind: Shortcut | None,
    inplanes: int,
    planes: int,
    stride: int,
    norm_layer: NormLayer,
    zeros: Zeros = "end",
) -> nn.Module | None:
    """The shortcut of one block by option A, B or C (He et al. 2015, section 4.1).

    Args:
        kind: "A" pads with zero channels and "B" projects, both only where the shape changes; "C"
            projects everywhere. None for a block without a shortcut.
        inplanes: channels of the block's input.
        planes: channels of the block's output.
        stride: of the block.
        norm_layer: makes the projection's norm.
        zeros: where option A puts its zero channels.

    Returns:
        None where the shortcut is an identity.
    """
    if kind is None or (kind != "C" and stride == 1 and inplanes == planes):
        return None
    if kind == "A":
        return PadShortcut(inplanes, planes, stride, zeros)
    return nn.Sequential(conv1x1(inplanes, planes, stride), norm_layer(planes))


def make_stage(
    block: Block,
    inplanes: int,
    planes: int,
    depth: int,
    stride: int,
    *,
    shortcut: Shortcut,
    zeros: Zeros = "end",
    norm_layer: NormLayer = nn.BatchNorm2d,
    dilations: tuple[int, int] = (1, 1),
    **settings: Any,
) -> nn.Sequential:
    """``depth`` blocks, of which the first has the stride.

    Args:
        block: the class of the blocks.
        inplanes: channels of the stage's input.
        planes: the blocks' ``planes``.
        depth: number of blocks.
        stride: of the first block.
        shortcut: see :func:`make_shortcut`; plain blocks have none.
        zeros: likewise.
        norm_layer: makes every norm.
        dilations: of the first block, and of the others.
        settings: more arguments of ``block``.
    """
    blocks = []
    kind = None if issubclass(block, PlainBlock) else shortcut
    for index in range(depth):
        downsample = make_shortcut(kind, inplanes, planes * block.expansion, stride, norm_layer, zeros)
        dilation = dilations[index > 0]
        blocks.append(
            block(inplanes, planes, stride, downsample, dilation=dilation, norm_layer=norm_layer, **settings)
        )
        inplanes, stride = planes * block.expansion, 1
    return nn.Sequential(*blocks)


def check_num_classes(num_classes: object) -> None:
    """Raises ValueError unless ``num_classes`` is a positive int."""
    if not isinstance(num_classes, Integral) or num_classes <= 0:
        raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")


def structure(keys: Iterable[str]) -> str:
    """Which stages a state_dict with these keys is made of: "3+4+6+3 blocks of 3 convolutions".

    Empty if there are none, as when every key has a prefix.
    """
    blocks: dict[str, set[str]] = {}
    convolutions = set()
    for key in keys:
        found = re.match(r"(layer\d+)\.(\d+)\.(conv\d)\.", key)
        if found:
            blocks.setdefault(found[1], set()).add(found[2])
            convolutions.add(found[3])
    if not blocks:
        return ""
    return f"{'+'.join(str(len(b)) for b in blocks.values())} blocks of {len(convolutions)} convolutions"


class Network(TraceForScript):
    """What the networks share: weights for another depth are refused in one line."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        needed, given = structure(self.state_dict()), structure(state_dict)
        if strict and given and given != needed:
            raise RuntimeError(f"state_dict must have {needed} for {type(self).__name__}, got {given}")
        return super().load_state_dict(state_dict, strict, assign)


class ResNet(Network):
    """The networks of He et al. 2015, table 1; use one of ResNet18 .. ResNet152.

    Children, parameters, state_dict keys and, for the same seed, initial values are torchvision's. A
    subclass says which ``block`` and how many of them in each stage.

    Args:
        num_classes: outputs of the classifier.
        variant: "v1.5", torchvision's, has a bottleneck's stride on the 3x3 convolution; "v1", the
            paper's, on the first 1x1.
        shortcut: of section 4.1. "A": zero channels where the shape changes (basic blocks only);
            "B": projections there; "C": projections everywhere.
        zero_init_residual: start with gamma = 0 in the last norm of every block.
        groups: of the bottlenecks' 3x3 convolutions (ResNeXt).
        width_per_group: width of the bottlenecks (ResNeXt, wide ResNet).
        replace_stride_with_dilation: three booleans, for stages 2 to 4.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d by default.

    Shapes:
        [N, 3, H, W], bf16 | fp16 | fp32, channels_last or NCHW -> [N, num_classes]

    Raises:
        ValueError: an argument outside of the above; names it.
    """

    block: ClassVar[Block]
    depths: ClassVar[tuple[int, int, int, int]]
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        variant: Variant = "v1.5",
        shortcut: Shortcut = "B",
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        one_of("shortcut", shortcut, ("A", "B", "C"))
        if shortcut == "A" and self.block is Bottleneck:
            raise ValueError(
                "shortcut must be 'B' or 'C' in a net of bottlenecks (the paper defines 'A' for basic "
                "blocks), got 'A'"
            )
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation must be None or three booleans, for stages 2 to 4, "
                f"got {dilate}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes, dilation = 64, 1
        for index, (depth, dilated) in enumerate(zip(self.depths, (False, *dilate), strict=True)):
            stride = 1 if index == 0 else 2
            planes, previous = 64 << index, dilation
            if dilated:
                dilation, stride = dilation * stride, 1
            stage = make_stage(
                self.block,
                inplanes,
                planes,
                depth,
                stride,
                shortcut=shortcut,
                norm_layer=norm_layer,
                dilations=(previous, dilation),
                groups=groups,
                base_width=width_per_group,
                variant=variant,
            )
            self.add_module(f"layer{index + 1}", stage)
            inplanes = planes * self.block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        with cast_weights(self, x):
            x = stem(self.conv1, self.bn1, self.relu, self.maxpool, x)
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = stage(x)
        return self.fc(torch.flatten(global_avg_pool(self.avgpool, x), 1))  # type: ignore[no-any-return]


class ResNet18(ResNet):
    """ResNet-18, 11,689,512 parameters; arguments in :class:`ResNet`."""

    block, depths = BasicBlock, (2, 2, 2, 2)


class ResNet34(ResNet):
    """ResNet-34, 21,797,672 parameters; arguments in :class:`ResNet`."""

    block, depths = BasicBlock, (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50, 25,557,032 parameters; arguments in :class:`ResNet`."""

    block, depths = Bottleneck, (3, 4, 6, 3)


class ResNet101(ResNet):
    """ResNet-101, 44,549,160 parameters; arguments in :class:`ResNet`."""

    block, depths = Bottleneck, (3, 4, 23, 3)


class ResNet152(ResNet):
    """ResNet-152, 60,192,808 parameters; arguments in :class:`ResNet`."""

    block, depths = Bottleneck, (3, 8, 36, 3)


def find_weights(weights: Any, name: str) -> Any:
    """The member of torchvision's weights enum for the model ``name`` that ``weights`` means."""
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError("weights=... needs torchvision: pip install torchvision") from error
    enum = models.get_model_weights(name)
    if isinstance(weights, enum):
        return weights
    member = weights.removeprefix(f"{enum.__name__}.") if isinstance(weights, str) else None
    if member not in enum.__members__:
        allowed = ", ".join(map(repr, enum.__members__))
        raise ValueError(f"weights of {name} must be in {enum.__name__}, one of {allowed}, got {weights!s}")
    return enum[member]


def _build(network: type[ResNet], weights: Any, progress: bool, arguments: dict[str, Any]) -> Any:
    if weights is None:
        return network(**arguments)
    found = find_weights(weights, network.__name__.lower())
    classes = len(found.meta["categories"])
    needed = {"num_classes": classes, "shortcut": "B", "variant": "v1.5", "groups": 1, "width_per_group": 64}
    for name, value in needed.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} with weights={found}, got {arguments[name]!r}")
    model = network(**{**arguments, "num_classes": classes})
    model.load_state_dict(found.get_state_dict(progress=progress, check_hash=True))
    return model


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet18:
    """A :class:`ResNet18`, with pretrained weights if asked for.

    Args:
        weights: a member of torchvision's ResNet18_Weights or its name ("DEFAULT", "IMAGENET1K_V1",
            "ResNet18_Weights.IMAGENET1K_V1"); None to initialise at random.
        progress: show the download's progress.
        kwargs: arguments of :class:`ResNet`.

    Raises:
        ImportError: ``weights`` without torchvision.
        ValueError: other weights than this network's, or an argument that they don't fit.
    """
    return _build(ResNet18, weights, progress, kwargs)  # type: ignore[no-any-return]


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet34:
    """A :class:`ResNet34`; see :func:`resnet18`."""
    return _build(ResNet34, weights, progress, kwargs)  # type: ignore[no-any-return]


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet50:
    """A :class:`ResNet50`; see :func:`resnet18`."""
    return _build(ResNet50, weights, progress, kwargs)  # type: ignore[no-any-return]


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet101:
    """A :class:`ResNet101`; see :func:`resnet18`."""
    return _build(ResNet101, weights, progress, kwargs)  # type: ignore[no-any-return]


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet152:
    """A :class:`ResNet152`; see :func:`resnet18`."""
    return _build(ResNet152, weights, progress, kwargs)  # type: ignore[no-any-return]
