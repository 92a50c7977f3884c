"""The batch-norm ops in Triton, for GPUs and, with TRITON_INTERPRET=1, for a CPU.

Tensors are [N, C, H, W] in channels_last, in memory a row-major matrix [N*H*W, C]. No float atomics:
the same input gives the same bits.
"""

from fusedres.kernels.triton.bn_act import bn_act
from fusedres.kernels.triton.bn_act_backward import bn_act_backward_apply, bn_act_backward_reduce
from fusedres.kernels.triton.bn_stats import bn_running_stats, bn_stats, bn_update_running_

__all__ = [
    "bn_act",
    "bn_act_backward_apply",
    "bn_act_backward_reduce",
    "bn_running_stats",
    "bn_stats",
    "bn_update_running_",
]
