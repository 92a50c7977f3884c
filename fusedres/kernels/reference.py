"""Plain PyTorch implementations of every op: the oracle, and what runs where no kernel does.

They take any floating dtype. Arithmetic is in float32, or in float64 where the activation is
float64, so an op called on ``x.double()`` gives the reference that the kernels are held against.

Like every implementation they write into tensors that the caller allocated (last arguments); an
output may be the same tensor as ``grad``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fusedres.kernels.rows import (
    MEAN,
    NOWHERE,
    OFFSET,
    RSTD,
    SCALE,
    SHIFT,
    SLOPE,
    STEM_BORDER,
    STEM_CHANNELS,
    STEM_SIDE,
    VAR,
)


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pack(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    shift = -mean * scale if bias is None else bias - mean * scale
    torch.stack([mean, var, rstd, scale, shift], out=out)


def bn_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    wide = x.to(out.dtype)
    mean = wide.mean((0, 2, 3))
    var = (wide - _per_channel(mean)).square().mean((0, 2, 3))
    _pack(mean, var, weight, bias, eps, out)


def bn_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    _pack(running_mean, running_var, weight, bias, eps, out)


def bn_update_running_(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    running_mean.lerp_(stats[MEAN], momentum)
    running_var.lerp_(stats[VAR] * (count / (count - 1)), momentum)


def _affine(x: Tensor, stats: Tensor) -> Tensor:
    return x.to(stats.dtype) * _per_channel(stats[SCALE]) + _per_channel(stats[SHIFT])


def bn_act(
    x: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    u = _affine(x, stats)
    if residual is not None:
        u = u + (residual if residual_stats is None else _affine(residual, residual_stats))
    out.copy_(torch.relu(u) if relu else u)


def _du(grad: Tensor, x: Tensor, z: Tensor | None, stats: Tensor, relu: bool) -> Tensor:
    """The gradient behind the ReLU: 0 where the stored output is <= 0 (so a NaN lets it through)."""
    if not relu:
        return grad
    stored = _affine(x, stats).to(x.dtype) if z is None else z
    return torch.where(stored <= 0, torch.zeros_like(grad), grad)


def _reduce(du: Tensor, x: Tensor, stats: Tensor, sums: Tensor) -> None:
    n, _, h, w = x.shape
    centred = x.to(stats.dtype) - _per_channel(stats[MEAN])
    dbias = du.sum((0, 2, 3))
    dweight = (du * centred).sum((0, 2, 3)) * stats[RSTD]
    per_value = -stats[SCALE] / (n * h * w)
    torch.stack([dbias, dweight, per_value * stats[RSTD] * dweight, per_value * dbias], out=sums)


def _apply(du: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None) -> Tensor:
    dx = _per_channel(stats[SCALE]) * du
    if sums is None:
        return dx
    centred = x.to(stats.dtype) - _per_channel(stats[MEAN])
    return dx + _per_channel(sums[SLOPE]) * centred + _per_channel(sums[OFFSET])


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
    masked = _du(grad, x, z, stats, relu)
    wide = masked.to(stats.dtype)
    _reduce(wide, x, stats, sums)
    if residual is not None and residual_stats is not None and residual_sums is not None:
        _reduce(wide, residual, residual_stats, residual_sums)
    if du is not None:
        du.copy_(masked)


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
    du = _du(grad, x, None, stats, relu).to(stats.dtype)
    if residual is not None and residual_stats is not None and dresidual is not None:
        dresidual.copy_(_apply(du, residual, residual_stats, residual_sums))
    dx.copy_(_apply(du, x, stats, sums))


def bn_relu_maxpool(x: Tensor, stats: Tensor, z: Tensor, index: Tensor) -> None:
    u = torch.relu(_affine(x, stats)).to(x.dtype)
    largest, flat = F.max_pool2d(u, 3, 2, 1, return_indices=True)
    width = x.shape[3]
    rows, columns = (torch.arange(n, device=x.device) for n in z.shape[2:])
    down = flat // width - (2 * rows[:, None] - 1)
    right = flat % width - (2 * columns - 1)
    z.copy_(largest)
    index.copy_(torch.where(largest <= 0, NOWHERE, 3 * down + right))


def _unpool(grad: Tensor, index: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """du: to every pixel, the gradients of the windows that it is the maximum of."""
    height, width = x.shape[2:]
    place = index.long()
    rows, columns = (torch.arange(n, device=x.device) for n in grad.shape[2:])
    flat = (2 * rows[:, None] - 1 + place // 3) * width + 2 * columns - 1 + place % 3
    somewhere = place != NOWHERE
    values = torch.where(somewhere, grad.to(dtype), 0)
    du = torch.zeros((*x.shape[:2], height * width), dtype=dtype, device=x.device)
    du.scatter_add_(2, torch.where(somewhere, flat, 0).flatten(2), values.flatten(2))
    return du.view(x.shape)


def bn_relu_maxpool_backward_reduce(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor
) -> None:
    _reduce(_unpool(grad, index, x, stats.dtype), x, stats, sums)


def bn_relu_maxpool_backward_apply(
    grad: Tensor, index: Tensor, x: Tensor, stats: Tensor, sums: Tensor | None, dx: Tensor
) -> None:
    dx.copy_(_apply(_unpool(grad, index, x, stats.dtype), x, stats, sums))


def bias_relu_maxpool(x: Tensor, bias: Tensor | None, z: Tensor) -> None:
    u = _wide(x) if bias is None else _wide(x) + _per_channel(bias)
    z.copy_(F.max_pool2d(torch.relu(u), 3, 2, 1))


def global_avg_pool(x: Tensor, out: Tensor) -> None:
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    out.copy_(x.to(wide).mean((2, 3), keepdim=True))


def global_avg_pool_backward(grad: Tensor, dx: Tensor) -> None:
    dx.copy_(grad / (dx.shape[2] * dx.shape[3]))


def cast_weights(weights: list[Tensor], out: list[Tensor]) -> None:
    for weight, cast in zip(weights, out, strict=True):
        cast.copy_(weight)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would round both to 16 bits again
        return F.conv2d(_wide(x), _wide(weight), bias, stride, padding)


def conv_fwd(
    x: Tensor,
    stats: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    relu: bool,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    z: Tensor | None,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    activation = x
    if stats is not None:
        activation = torch.empty_like(x) if z is None else z
        bn_act(x, stats, residual, residual_stats, relu, activation)
    y.copy_(_convolve(activation, weight, None, stride, weight.shape[2] // 2))
    if y_stats is not None:
        bn_stats(y, norm_weight, norm_bias, eps, y_stats)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    z: Tensor,
) -> None:
    u = _convolve(x, weight, bias, stride, weight.shape[2] // 2)
    if residual is not None:
        u += residual
    z.copy_(torch.relu(u) if relu else u)


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
    inner = [torch.empty_like(x[:, :1].expand(-1, weight1.shape[0], -1, -1)) for _ in range(2)]
    conv_bias_act(x, weight1, bias1, None, True, 1, inner[0])
    conv_bias_act(inner[0], weight2, bias2, None, True, 1, inner[1])
    conv_bias_act(inner[1], weight3, bias3, x, True, 1, z)


def conv_int8(
    x: Tensor,
    border: Tensor,
    weight: Tensor,
    offset: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_step: float,
    floor: float,
    stride: int,
    z: Tensor,
) -> None:
    side, (n, _, height, width) = weight.shape[2] // 2, x.shape
    padded = _per_channel(border).repeat(n, 1, height + 2 * side, width + 2 * side)
    padded[:, :, side : side + height, side : side + width] = x
    # integers up to 2^53 are exact in float64, which has a convolution on every device
    sums = F.conv2d(padded.double(), weight.double(), None, stride) + _per_channel(offset)
    u = sums.float() * _per_channel(scale) + _per_channel(bias)
    if residual is not None:
        u += residual * residual_step
    u = torch.where(u < floor, floor, u)
    z.copy_(torch.round(u).clamp(-128, 127) if z.dtype == torch.int8 else u)


def quantize_int8(x: Tensor, step: float, zero: int, z: Tensor) -> None:
    z.copy_(torch.round(_wide(x) / step + zero).clamp(-128, 127))


def _output_gradient(du: Tensor, y: Tensor | None, y_stats: Tensor | None, y_sums: Tensor | None) -> Tensor:
    """The gradient of a convolution's raw output, from that behind its batch norm."""
    if y_stats is None:
        return _wide(du)
    # without sums y isn't looked at
    return _wide(_apply(_wide(du), du if y is None else y, y_stats, y_sums).to(du.dtype))


def conv_dgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    weight: Tensor,
    stride: int,
    add: Tensor | None,
    first: int,
    x: Tensor | None,
    x_stats: Tensor | None,
    relu: bool,
    dx: Tensor,
    x_sums: Tensor | None,
) -> None:
    dy = _output_gradient(du, y, y_stats, y_sums)
    gradient = conv2d_input(  # type: ignore[no-untyped-call]
        dx.shape, _wide(weight), dy, stride, weight.shape[2] // 2
    )
    if add is not None:
        compact = add.shape[2:] != dx.shape[2:]
        of = gradient[:, :, ::2, ::2] if compact else gradient
        of += add[:, first : first + dx.shape[1]]
    gradient = gradient.to(dx.dtype)
    if x is not None and x_stats is not None:
        gradient = _du(gradient, x, None, x_stats, relu)
        if x_sums is not None:
            _reduce(_wide(gradient), x, x_stats, x_sums)
    dx.copy_(gradient)


def conv_wgrad(
    du: Tensor,
    y: Tensor | None,
    y_stats: Tensor | None,
    y_sums: Tensor | None,
    x: Tensor,
    x_stats: Tensor | None,
    relu: bool,
    stride: int,
    dweight: Tensor,
) -> None:
    if x_stats is not None:
        u = _affine(x, x_stats)
        x = (torch.relu(u) if relu else u).to(x.dtype)
    dy = _output_gradient(du, y, y_stats, y_sums)
    padding = dweight.shape[2] // 2
    dweight.copy_(conv2d_weight(_wide(x), dweight.shape, dy, stride, padding))  # type: ignore[no-untyped-call]


def stem_conv(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    pixels: Tensor,
    y: Tensor,
    y_stats: Tensor | None,
) -> None:
    height, width = x.shape[2:]
    pixels.zero_()
    image = pixels[:, STEM_BORDER : STEM_BORDER + height, STEM_BORDER + 1 : STEM_BORDER + 1 + width]
    image[..., :STEM_CHANNELS] = x.permute(0, 2, 3, 1)
    y.copy_(_convolve(x.to(y.dtype), weight.to(y.dtype), None, 2, STEM_BORDER))
    if y_stats is not None:
        bn_stats(y, norm_weight, norm_bias, eps, y_stats)


def stem_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pool: bool,
    z: Tensor,
) -> None:
    image = x.to(_wide(z).dtype)
    if mean is not None and std is not None:
        of_mean, of_std = (image.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
        image = (image - of_mean) / of_std
    u = _convolve(image.to(z.dtype), weight.to(z.dtype), bias, 2, STEM_BORDER).relu_()
    z.copy_(F.max_pool2d(u, 3, 2, 1) if pool else u)


def stem_wgrad(dy: Tensor, pixels: Tensor, dweight: Tensor) -> None:
    # a window has a pixel more than the filters on its left
    image = _wide(pixels[:, :, 1:, :STEM_CHANNELS].permute(0, 3, 1, 2))
    rows, columns = (2 * size + STEM_SIDE - 2 for size in dy.shape[2:])
    dweight.copy_(conv2d_weight(image[:, :, :rows, :columns], dweight.shape, _wide(dy), 2))  # type: ignore[no-untyped-call]
