"""torchvision's residual blocks and nets with fused forwards; parameters, buffers and keys are theirs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fusedres._convert.kind import Kind
from fusedres.nn import (
    Residual,
    TraceForScript,
    basic_pairs,
    bottleneck_pairs,
    cast_weights,
    global_avg_pool,
    stem,
    unfused_chain_reason,
    unfused_stem_reason,
)

_STEM = ("conv1", "bn1", "relu", "maxpool")


class FusedBasicBlock(Residual, TraceForScript, BasicBlock):  # type: ignore[misc]
    pairs = property(basic_pairs)


class FusedBottleneck(Residual, TraceForScript, Bottleneck):  # type: ignore[misc]
    pairs = property(bottleneck_pairs)


class FusedResNet(TraceForScript, ResNet):  # type: ignore[misc]
    """The stem as one Function; weights cast all at once under autocast."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        net: Any = self
        with cast_weights(self, x):
            x = stem(*_stem_of(net), x)
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                x = stage(x)
        return net.fc(torch.flatten(global_avg_pool(net.avgpool, x), 1))  # type: ignore[no-any-return]


class FusedLayerGetter(IntermediateLayerGetter):  # type: ignore[misc]
    """The backbone of torchvision's detectors and segmentation nets: the same for the outputs of stages."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        if not _starts_with_a_stem(self):
            return super().forward(x)  # type: ignore[no-any-return]
        out = OrderedDict()
        with cast_weights(self, x):
            x = stem(*_stem_of(self), x)
            for name, module in list(self.items())[len(_STEM) :]:
                x = module(x)
                if name in self.return_layers:
                    out[self.return_layers[name]] = x
        return out


def _starts_with_a_stem(getter: Any) -> bool:
    return tuple(getter)[: len(_STEM)] == _STEM and not any(name in getter.return_layers for name in _STEM)


def _stem_of(net: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    return net.conv1, net.bn1, net.relu, net.maxpool


def _basic_reason(block: Any) -> str | None:
    return unfused_chain_reason(basic_pairs(block), block.relu, block.downsample)


def _bottleneck_reason(block: Any) -> str | None:
    return unfused_chain_reason(bottleneck_pairs(block), block.relu, block.downsample)


def _net_reason(net: Any) -> str | None:
    return unfused_stem_reason(*_stem_of(net))


def _getter_reason(getter: Any) -> str | None:
    return _net_reason(getter) if _starts_with_a_stem(getter) else "it has no stem, or gives parts of it"


KINDS = {
    BasicBlock: Kind(FusedBasicBlock, _basic_reason),
    Bottleneck: Kind(FusedBottleneck, _bottleneck_reason),
    ResNet: Kind(FusedResNet, _net_reason, is_net=True),
    IntermediateLayerGetter: Kind(FusedLayerGetter, _getter_reason, is_net=True),
}
