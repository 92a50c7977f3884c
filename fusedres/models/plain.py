"""The plain networks of He et al. 2015, table 1: ResNet-18 and 34 without their shortcuts."""

from __future__ import annotations

from fusedres.models.resnet import ResNet
from fusedres.nn import NormLayer, PlainBlock


class PlainNet(ResNet):
    """The plain networks of He et al. 2015, section 3.3; use PlainNet18 or PlainNet34.

    Children, names and, for the same seed, initial values are those of the ResNet with shortcut A.

    Args:
        num_classes: outputs of the classifier.
        norm_layer: makes a norm from a number of channels; nn.BatchNorm2d by default.

    Shapes:
        [N, 3, H, W], bf16 | fp16 | fp32, channels_last or NCHW -> [N, num_classes]

    Raises:
        ValueError: num_classes is no positive integer.
    """

    block = PlainBlock

    def __init__(self, num_classes: int = 1000, *, norm_layer: NormLayer | None = None) -> None:
        super().__init__(num_classes, norm_layer=norm_layer)


class PlainNet18(PlainNet):
    """The plain 18-layer net, 11,515,688 parameters; arguments in :class:`PlainNet`."""

    depths = (2, 2, 2, 2)


class PlainNet34(PlainNet):
    """The plain 34-layer net, 21,623,848 parameters; arguments in :class:`PlainNet`."""

    depths = (3, 4, 6, 3)
