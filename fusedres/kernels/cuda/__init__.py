"""The compiled module's CUDA kernels."""

from fusedres.kernels.cuda.batch_norm import (
    bn_act,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    bn_running_stats,
    bn_stats,
    bn_update_running_,
)
from fusedres.kernels.cuda.bottleneck_infer import bottleneck_infer
from fusedres.kernels.cuda.cast_weights import cast_weights
from fusedres.kernels.cuda.conv import conv_bias_act, conv_fwd
from fusedres.kernels.cuda.conv_dgrad import conv_dgrad
from fusedres.kernels.cuda.pools import (
    bias_relu_maxpool,
    bn_relu_maxpool,
    bn_relu_maxpool_backward_apply,
    bn_relu_maxpool_backward_reduce,
    global_avg_pool,
    global_avg_pool_backward,
)
from fusedres.kernels.cuda.stem import stem_bias_act, stem_conv, stem_wgrad

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
    "bottleneck_infer",
    "cast_weights",
    "conv_bias_act",
    "conv_dgrad",
    "conv_fwd",
    "global_avg_pool",
    "global_avg_pool_backward",
    "stem_bias_act",
    "stem_conv",
    "stem_wgrad",
]
