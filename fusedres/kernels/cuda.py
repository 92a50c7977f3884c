"""The compiled module's CUDA kernels.

Tensors come checked and in channels_last from ``ops``; here they become addresses, sizes and a
stream. Scratch memory is allocated here, so that the kernels never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres import _C

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(function: Callable[..., None], x: Tensor, *arguments: Any) -> None:
    """Call a launcher on the current stream of the device of ``x``."""
    device = x.device
    # as Triton finds it: a Stream object costs more than the launch
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        function(*arguments, _multiprocessors(device), stream)
        return
    with torch.cuda.device(device):
        function(*arguments, _multiprocessors(device), stream)


def _matrix(x: Tensor) -> tuple[str, int, int]:
    """dtype, rows, channels."""
    n, c, h, w = x.shape
    return _DTYPES[x.dtype], n * h * w, c


def _image(x: Tensor) -> tuple[str, int, int, int, int]:
    """dtype, N, H, W, C."""
    n, c, h, w = x.shape
    return _DTYPES[x.dtype], n, h, w, c


@functools.lru_cache(maxsize=4096)
def _workspace_size(dtype: str, rows: int, channels: int, quantities: int, device: torch.device) -> int:
    return _C.cuda_bn_workspace(dtype, rows, channels, quantities, _multiprocessors(device))


@functools.lru_cache(maxsize=4096)
def _maxpool_workspace_size(
    dtype: str, n: int, height: int, width: int, channels: int, device: torch.device
) -> int:
    return _C.cuda_bn_relu_maxpool_workspace(dtype, n, height, width, channels, _multiprocessors(device))


def _floats(number: int, x: Tensor) -> Tensor:
    return torch.empty(number, dtype=torch.float32, device=x.device)


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    matrix = _matrix(x)
    workspace = _floats(_workspace_size(*matrix, 2, x.device), x)
    _launch(_C.cuda_bn_stats, x, *matrix, _at(x), _at(weight), _at(bias), eps, _at(workspace), _at(out))


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    _launch(
        _C.cuda_bn_running_stats,
        running_mean,
        running_mean.shape[0],
        _at(running_mean),
        _at(running_var),
        _at(weight),
        _at(bias),
        eps,
        _at(out),
    )


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    _launch(
        _C.cuda_bn_update_running_,
        running_mean,
        running_mean.shape[0],
        _at(running_mean),
        _at(running_var),
        _at(stats),
        count,
        momentum,
    )


def bn_act(
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    _launch(
        _C.cuda_bn_act,
        x,
        *_matrix(x),
        _at(x),
        _at(stats),
        _at(residual),
        _at(residual_stats),
        relu,
        _at(out),
    )


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
    matrix = _matrix(x)
    quantities = 2 if residual is None else 3
    workspace = _floats(_workspace_size(*matrix, quantities, x.device), x)
    _launch(
        _C.cuda_bn_act_backward_reduce,
        x,
        *matrix,
        _at(grad),
        _at(x),
        _at(z),
        _at(stats),
        _at(residual),
        _at(residual_stats),
        relu,
        _at(workspace),
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
    _launch(
        _C.cuda_bn_act_backward_apply,
        x,
        *_matrix(x),
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
    _launch(_C.cuda_bn_relu_maxpool, x, *_image(x), _at(x), _at(stats), _at(z), _at(index))


def bias_relu_maxpool(x: Tensor, bias: Tensor | None, z: Tensor) -> None:
    _launch(_C.cuda_bias_relu_maxpool, x, *_image(x), _at(x), _at(bias), _at(z))


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor
) -> None:
    image = _image(x)
    workspace = _floats(_maxpool_workspace_size(*image, x.device), x)
    _launch(
        _C.cuda_bn_relu_maxpool_backward_reduce,
        x,
        *image,
        _at(grad),
        _at(index),
        _at(x),
        _at(stats),
        _at(workspace),
        _at(sums),
    )


def bn_relu_maxpool_backward_apply(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, dx: Tensor
) -> None:
    _launch(
        _C.cuda_bn_relu_maxpool_backward_apply,
        x,
        *_image(x),
        _at(grad),
        _at(index),
        _at(x),
        _at(stats),
        _at(sums),
        _at(dx),
    )


def global_avg_pool(x: Tensor, out: Tensor) -> None:
    _launch(_C.cuda_global_avg_pool, x, *_image(x), _at(x), _at(out))


def global_avg_pool_backward(grad: Tensor, dx: Tensor) -> None:
    _launch(_C.cuda_global_avg_pool_backward, dx, *_image(dx), _at(grad), _at(dx))


def cast_weights(weights: list[Tensor], out: list[Tensor]) -> None:
    entries = []
    for weight, cast in zip(weights, out, strict=True):
        outer, inner, height, width = weight.shape
        taps = height * width
        if weight.is_contiguous(memory_format=torch.channels_last):
            inner, taps = inner * taps, 1
        entries.append((_at(weight), _at(cast), outer, inner, taps))
    _launch(_C.cuda_cast_weights, out[0], _DTYPES[out[0].dtype], entries)
