"""Stateless public functions: the contract, its validation, and the autograd Functions."""

from fusedres.functional.batch_norm import BatchNorm
from fusedres.functional.bn_act import bn_act
from fusedres.functional.bn_relu_maxpool import bn_relu_maxpool
from fusedres.functional.cast_weights import cast_weights, casts_weights
from fusedres.functional.chain import ConvNorm, Pad
from fusedres.functional.conv_bn_act import basic_block, bottleneck, conv_bn_act, plain_block
from fusedres.functional.global_avg_pool import global_avg_pool
from fusedres.functional.stem import stem

__all__ = [
    "BatchNorm",
    "ConvNorm",
    "Pad",
    "basic_block",
    "bn_act",
    "bn_relu_maxpool",
    "bottleneck",
    "cast_weights",
    "casts_weights",
    "conv_bn_act",
    "global_avg_pool",
    "plain_block",
    "stem",
]
