"""The compiled module's kernels: C++ on a CPU, CUDA on a GPU.

Tensors come checked and in one layout from ``ops``; here they become addresses, sizes and a stream.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusedres import _C

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _shape(x: Tensor) -> tuple[str, int, int, int, bool, int]:
    """dtype, N, C, H*W, whether the layout is NCHW, threads."""
    n, c, h, w = x.shape
    # with one pixel or one channel it is both: take the longer axis
    planes = x.is_contiguous() and (h * w > 1 or c == 1)
    return _DTYPES[x.dtype], n, c, h * w, planes, torch.get_num_threads()


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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def bn_act(x: Tensor, stats: Tensor, residual: Tensor | None, relu: bool, out: Tensor) -> None:
    if x.device.type == "cpu":
        _C.cpu_bn_act(*_shape(x), _at(x), _at(stats), _at(residual), relu, _at(out))
        return
    n, c, h, w = x.shape
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.cuda_bn_act(
            _DTYPES[x.dtype],
            n * h * w,
            c,
            _multiprocessors(x.device),
            _at(x),
            _at(stats),
            _at(residual),
            relu,
            _at(out),
            stream,
        )


def bn_act_backward_reduce(
    grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool, du: Tensor | None, sums: Tensor
) -> None:
    _C.cpu_bn_act_backward_reduce(*_shape(x), _at(grad), _at(x), _at(z), _at(stats), relu, _at(du), _at(sums))


def bn_act_backward_apply(
    grad: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, relu: bool, out: Tensor
) -> None:
    _C.cpu_bn_act_backward_apply(*_shape(x), _at(grad), _at(x), _at(stats), _at(sums), relu, _at(out))
