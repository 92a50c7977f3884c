"""Batch norm and convolutions in Triton, for GPUs and, with TRITON_INTERPRET=1, for a CPU.

Tensors are [N, C, H, W] in channels_last, in memory a row-major matrix [N*H*W, C]. No float atomics:
the same input gives the same bits.
"""

from fusedres.kernels.triton import settings
from fusedres.kernels.triton.bn_act import bn_act
from fusedres.kernels.triton.bn_act_backward import bn_act_backward_apply, bn_act_backward_reduce
from fusedres.kernels.triton.bn_stats import bn_running_stats, bn_stats, bn_update_running_
from fusedres.kernels.triton.conv_bias_act import conv_bias_act
from fusedres.kernels.triton.conv_dgrad import conv_dgrad
from fusedres.kernels.triton.conv_fwd import conv_fwd
from fusedres.kernels.triton.conv_int8 import conv_int8
from fusedres.kernels.triton.conv_wgrad import conv_wgrad
from fusedres.kernels.triton.quantize_int8 import quantize_int8
from fusedres.kernels.triton.stem_conv import stem_conv
from fusedres.kernels.triton.stem_wgrad import stem_wgrad

__all__ = [
    "bn_act",
    "bn_act_backward_apply",
    "bn_act_backward_reduce",
    "bn_running_stats",
    "bn_stats",
    "bn_update_running_",
    "conv_bias_act",
    "conv_dgrad",
    "conv_fwd",
    "conv_int8",
    "conv_wgrad",
    "quantize_int8",
    "settings",
    "stem_conv",
    "stem_wgrad",
]
