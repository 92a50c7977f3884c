"""timm's residual blocks and nets with fused forwards; parameters, buffers and keys are theirs."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from fusedres._convert.kind import Kind
from fusedres.nn import (
    Pairs,
    TraceForScript,
    basic_pairs,
    bottleneck_pairs,
    cast_weights,
    fused_chain,
    stem,
    unfused_chain_reason,
    unfused_reason,
    unfused_stem_reason,
)


def _forward(block: Any, pairs: Pairs, acts: tuple[nn.Module, ...], x: Tensor) -> Tensor | None:
    """The block as one Function; None where its own forward has to be called."""
    if torch.compiler.is_compiling() or _block_reason(block, pairs, acts) is not None:
        return None
    return fused_chain(pairs, acts[-1], x, block.downsample)


def _block_reason(block: Any, pairs: Pairs, acts: tuple[nn.Module, ...]) -> str | None:
    """Beside torchvision's, timm's blocks have an activation for each norm, and places for other modules."""
    for name in ("drop_block", "aa", "se", "drop_path"):
        module = getattr(block, name)
        if module is not None and type(module) is not nn.Identity:
            return f"the block has a {type(module).__name__}"
    kinds = {type(act) for act in acts}
    if len(kinds) > 1:
        return f"the activations are of several kinds: {', '.join(sorted(kind.__name__ for kind in kinds))}"
    for (_, norm), act in zip(pairs, acts, strict=True):
        why = unfused_reason(norm, act)
        if why is not None:
            return why
    return unfused_chain_reason(pairs, acts[-1], block.downsample)


class FusedBasicBlock(TraceForScript, BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        fused = _forward(self, basic_pairs(self), (self.act1, self.act2), x)
        return super().forward(x) if fused is None else fused


class FusedBottleneck(TraceForScript, Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        fused = _forward(self, bottleneck_pairs(self), (self.act1, self.act2, self.act3), x)
        return super().forward(x) if fused is None else fused


class FusedResNet(TraceForScript, ResNet):
    """The stem as one Function; weights cast all at once under autocast."""

    def forward_features(self, x: Tensor) -> Tensor:
        stages: list[Any] = [self.layer1, self.layer2, self.layer3, self.layer4]
        with cast_weights(self, x):
            x = stem(self.conv1, self.bn1, self.act1, self.maxpool, x)
            if self.grad_checkpointing:
                return checkpoint_seq(stages, x, flatten=True)  # type: ignore[no-any-return]
            for stage in stages:
                x = stage(x)
        return x


def _basic_reason(block: Any) -> str | None:
    return _block_reason(block, basic_pairs(block), (block.act1, block.act2))


def _bottleneck_reason(block: Any) -> str | None:
    return _block_reason(block, bottleneck_pairs(block), (block.act1, block.act2, block.act3))


def _net_reason(net: Any) -> str | None:
    return unfused_stem_reason(net.conv1, net.bn1, net.act1, net.maxpool)


KINDS = {
    BasicBlock: Kind(FusedBasicBlock, _basic_reason),
    Bottleneck: Kind(FusedBottleneck, _bottleneck_reason),
    ResNet: Kind(FusedResNet, _net_reason, is_net=True),
}
