"""The CIFAR networks of He et al. 2015, section 4.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedres.models.resnet import Network, Shortcut, check_num_classes, make_stage
from fusedres.nn import (
    BasicBlock,
    PlainBlock,
    Zeros,
    batch_norm_act,
    cast_weights,
    conv3x3,
    convolve,
    global_avg_pool,
    one_of,
)


class CifarResNet(Network):
    """A ResNet of 6n+2 layers for 32x32 images: 3x3 convolutions of 16, 32 and 64 channels.

    Args:
        depth: 6n+2, as 20, 32, 44, 56, 110 and 1202.
        shortcut: "A" (the paper's), "B" or "C", see :class:`fusedres.models.resnet.ResNet`.
        plain: without shortcuts, the paper's plain nets.
        zeros: where option A puts its zero channels: "end", or "split" on both sides.
        num_classes: outputs of the classifier.

    Shapes:
        [N, 3, H, W], bf16 | fp16 | fp32, channels_last or NCHW -> [N, num_classes]

    Raises:
        ValueError: an argument outside of the above; names it.
    """

    def __init__(
        self,
        depth: int,
        *,
        shortcut: Shortcut = "A",
        plain: bool = False,
        zeros: Zeros = "end",
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n+2, as 20, 32, 44, 56 or 110, got {depth!r}")
        one_of("shortcut", shortcut, ("A", "B", "C"))
        one_of("zeros", zeros, ("end", "split"))
        check_num_classes(num_classes)
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        block = PlainBlock if plain else BasicBlock
        self.layer1 = make_stage(block, 16, 16, blocks, 1, shortcut=shortcut, zeros=zeros)
        self.layer2 = make_stage(block, 16, 32, blocks, 2, shortcut=shortcut, zeros=zeros)
        self.layer3 = make_stage(block, 32, 64, blocks, 2, shortcut=shortcut, zeros=zeros)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        with cast_weights(self, x):
            x = batch_norm_act(self.bn1, self.relu, convolve(self.conv1, x))
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(global_avg_pool(self.avgpool, x), 1))  # type: ignore[no-any-return]
