"""A ResNet's stem and stages as what computes the features of a detector or a segmentation net."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusedres.nn import TraceForScript, batch_norm_act, cast_weights, convolve, stem

_STEM = ("conv1", "bn1", "relu", "maxpool")
# in the order in which they are frozen last
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")


class Trunk(TraceForScript):
    """A net up to its last stage that is asked for; gives the outputs of some stages.

    Children keep their names, so keys of the state_dict are those of torchvision's backbones
    (``conv1.weight``, ``layer1.0.bn1.bias``). The net's own modules are taken, not copied.

    Args:
        net: a :class:`fusedres.models.resnet.ResNet` or :class:`fusedres.CifarResNet`, or another net with
            such children.
        return_layers: which stages' outputs to give, as {"layer4": "out"}: the stage's name and the name
            in the output.

    Shapes:
        [N, 3, H, W], bf16 | fp16 | fp32, channels_last or NCHW -> an OrderedDict, in the order of the stages,
        of [N, channels[name], H / strides[name], W / strides[name]], rounded up

    Attributes:
        channels: of each output, by its name.
        strides: of each output, in pixels of the input, by its name.

    Raises:
        ValueError: no stages, a stage that the net doesn't have, or a net without such children.
    """

    def __init__(self, net: nn.Module, return_layers: Mapping[str, str]) -> None:
        super().__init__()
        children = dict(net.named_children())
        stages = [name for name in children if name.startswith("layer")]
        missing = [name for name in _STEM[:3] if name not in children]
        if missing or not stages:
            raise ValueError(
                f"net must have children {', '.join(_STEM[:3])} and layer1, as ResNets do, "
                f"got a {type(net).__name__}"
            )
        unknown = [name for name in return_layers if name not in stages]
        if unknown or not return_layers:
            raise ValueError(
                f"return_layers must name some of {', '.join(stages)} of the net, got {dict(return_layers)}"
            )
        for name in _STEM:
            if name in children:
                self.add_module(name, children[name])
        self.return_layers = dict(return_layers)
        self.channels: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        stride = 1
        for name in ("conv1", "maxpool"):
            stride *= _stride(children.get(name))
        for name in stages[: 1 + max(map(stages.index, return_layers))]:
            blocks: Any = children[name]
            self.add_module(name, blocks)
            for block in blocks:
                stride *= _stride(block)
            if name in return_layers:
                self.channels[return_layers[name]] = _channels(blocks[-1])
                self.strides[return_layers[name]] = stride

    @property
    def out_channels(self) -> int:
        """Channels of the last output, where torchvision's detectors look for them."""
        return next(reversed(self.channels.values()))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        children: Any = self._modules
        out = OrderedDict()
        with cast_weights(self, x):
            if "maxpool" in children:
                x = stem(self.conv1, self.bn1, self.relu, self.maxpool, x)  # type: ignore[arg-type]
            else:
                x = batch_norm_act(self.bn1, self.relu, convolve(self.conv1, x))  # type: ignore[arg-type]
            for name, stage in children.items():
                if name in _STEM:
                    continue
                x = stage(x)
                if name in self.return_layers:
                    out[self.return_layers[name]] = x
        return out


def freeze(net: nn.Module, trainable_layers: int) -> None:
    """Keep all but the last layers of a net from training, as torchvision's detectors do.

    Args:
        net: a ResNet.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and conv1 go on training; 5 for all, bn1
            included. Whether a batch norm's statistics are updated is its own business.

    Raises:
        ValueError: ``trainable_layers`` isn't from 0 to 5.
    """
    if trainable_layers not in range(6):
        raise ValueError(f"trainable_layers must be from 0 to 5, got {trainable_layers}")
    trained = _LAYERS[: trainable_layers + (trainable_layers == 5)]
    for name, parameter in net.named_parameters():
        if not name.startswith(trained):
            parameter.requires_grad_(False)


def _stride(module: Any) -> int:
    stride = getattr(module, "stride", 1)
    return stride[0] if isinstance(stride, tuple) else int(stride)


def _channels(block: nn.Module) -> int:
    """Channels of a residual block's output: the filters of its last convolution."""
    convs = [child for name, child in block.named_children() if name.startswith("conv")]
    return convs[-1].out_channels  # type: ignore[return-value]
