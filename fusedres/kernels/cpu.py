"""The compiled module's CPU kernels.

Tensors come checked and in one layout from ``ops``; here they become addresses and sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _image(x: Tensor) -> tuple[str, int, int, int, int, bool, int]:
    """dtype, N, C, H, W, whether the layout is NCHW, threads."""
    n, c, h, w = x.shape
    # with one pixel or one channel it is both: take the longer axis
    planes = x.is_contiguous() and (h * w > 1 or c == 1)
    return _DTYPES[x.dtype], n, c, h, w, planes, torch.get_num_threads()


def _shape(x: Tensor) -> tuple[str, int, int, int, bool, int]:
    """dtype, N, C, H*W, whether the layout is NCHW, threads."""
    dtype, n, c, h, w, planes, threads = _image(x)
    return dtype, n, c, h * w, planes, threads


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    _C.cpu_bn_stats(*_shape(x), _at(x), _at(weight), _at(bias), eps, _at(out))


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    channels = running_mean.shape[0]
    _C.cpu_bn_running_stats(
        channels, _at(running_mean), _at(running_var), _at(weight), _at(bias), eps, _at(out)
    )


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    channels = running_mean.shape[0]
    _C.cpu_bn_update_running_(channels, _at(running_mean), _at(running_var), _at(stats), count, momentum)


def bn_act(
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    _C.cpu_bn_act(*_shape(x), _at(x), _at(stats), _at(residual), _at(residual_stats), relu, _at(out))


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    du: Tensor | None,
    sums: Tensor,
    residual_sums: Tensor | None,
) -> None:
    _C.cpu_bn_act_backward_reduce(
        *_shape(x),
        _at(grad),
        _at(x),
        _at(z),
        _at(stats),
        _at(residual),
        _at(residual_stats),
        relu,
        _at(du),
        _at(sums),
        _at(residual_sums),
    )


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_sums: Tensor | None,
    relu: bool,
    dx: Tensor,
    dresidual: Tensor | None,
) -> None:
    _C.cpu_bn_act_backward_apply(
        *_shape(x),
        _at(grad),
        _at(x),
        _at(stats),
        _at(sums),
        _at(residual),
        _at(residual_stats),
        _at(residual_sums),
        relu,
        _at(dx),
        _at(dresidual),
    )


def bn_relu_maxpool(x: Tensor, stats: Tensor, z: Tensor, index: Tensor) -> None:
    _C.cpu_bn_relu_maxpool(*_image(x), _at(x), _at(stats), _at(z), _at(index))


def bias_relu_maxpool(x: Tensor, bias: Tensor | None, z: Tensor) -> None:
    _C.cpu_bias_relu_maxpool(*_image(x), _at(x), _at(bias), _at(z))


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor
) -> None:
    _C.cpu_bn_relu_maxpool_backward_reduce(*_image(x), _at(grad), _at(index), _at(x), _at(stats), _at(sums))


def bn_relu_maxpool_backward_apply(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, dx: Tensor
) -> None:
    _C.cpu_bn_relu_maxpool_backward_apply(
        *_image(x), _at(grad), _at(index), _at(x), _at(stats), _at(sums), _at(dx)
    )
