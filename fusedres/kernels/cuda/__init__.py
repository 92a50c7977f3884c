"""The compiled module's CUDA kernels."""

from fusedres.kernels.cuda.batch_norm import (
    bn_act,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    bn_running_stats,
    bn_stats,
    bn_update_running_,
)
from fusedres.kernels.cuda.cast_weights import cast_weights
from fusedres.kernels.cuda.conv_dgrad import conv_dgrad
from fusedres.kernels.cuda.pools import (
    bias_relu_maxpool,
    bn_relu_maxpool,
    bn_relu_maxpool_backward_apply,
    bn_relu_maxpool_backward_reduce,
    global_avg_pool,
    global_avg_pool_backward,
)

__all__ = [
    "bias_relu_maxpool",
    "bn_act",
    "bn_act_backward_apply",
    "bn_act_backward_reduce",
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward_apply",
    "bn_relu_maxpool_backward_reduce",
    "bn_running_stats",
    "bn_stats",
    "bn_update_running_",
    "cast_weights",
    "conv_dgrad",
    "global_avg_pool",
    "global_avg_pool_backward",
]
