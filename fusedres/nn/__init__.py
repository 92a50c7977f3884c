"""The residual blocks as modules, and the glue from nn.BatchNorm2d, nn.ReLU children to ``functional``."""

from fusedres.nn.blocks import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    PlainBlock,
    Residual,
    TraceForScript,
    Variant,
    basic_pairs,
    bottleneck_pairs,
    conv1x1,
    conv3x3,
    unfused_block_reason,
)
from fusedres.nn.casts import cast_weights, convolve
from fusedres.nn.chain import Pairs, fused_chain, unfused_chain_reason
from fusedres.nn.frozen import FrozenBatchNorm2d
from fusedres.nn.fuse import batch_norm_act, global_avg_pool, unfused_reason
from fusedres.nn.shortcut import PadShortcut, Zeros, one_of, shortcut
from fusedres.nn.stem import batch_norm_act_maxpool, stem, unfused_stem_reason

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "FrozenBatchNorm2d",
    "NormLayer",
    "PadShortcut",
    "Pairs",
    "PlainBlock",
    "Residual",
    "TraceForScript",
    "Variant",
    "Zeros",
    "basic_pairs",
    "batch_norm_act",
    "batch_norm_act_maxpool",
    "bottleneck_pairs",
    "cast_weights",
    "conv1x1",
    "conv3x3",
    "convolve",
    "fused_chain",
    "global_avg_pool",
    "one_of",
    "shortcut",
    "stem",
    "unfused_block_reason",
    "unfused_chain_reason",
    "unfused_reason",
    "unfused_stem_reason",
]
