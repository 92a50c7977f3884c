"""A residual block of a trained net in one launch, in CUDA."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.cuda import launch


def bottleneck_infer(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    z: Tensor,
) -> None:
    n, channels, height, width = x.shape
    sizes = (launch.DTYPES[x.dtype], n, height, width, channels, weight2.shape[0])
    tensors = launch.aligned(x, weight1, bias1, weight2, bias2, weight3, bias3)
    launch.run("bottleneck_infer", x, *sizes, *tensors, z)
