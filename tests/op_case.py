"""Arguments for every registered op."""

from __future__ import annotations

import torch

from fusedres.kernels.rows import SUMS_ROWS, pixels_shape

OPS = torch.ops.fusedres
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


def activation(shape=(2, 5, 4, 3), dtype=torch.float32, layout="channels_last"):
    return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])


def is_activation(a):
    return isinstance(a, torch.Tensor) and a.dim() == 4


def arguments(name, dtype=torch.float32, layout="channels_last"):
    x, grad, z, r = (activation(dtype=dtype, layout=layout) for _ in range(4))
    channels = x.shape[1]
    weight, bias, mean = torch.randn(3, channels)
    var = torch.rand(channels) + 0.5
    stats, r_stats = (OPS.bn_stats(t, weight, bias, 1e-5) for t in (x, r))
    sums, r_sums = torch.randn(2, SUMS_ROWS, channels)
    pooled, index = OPS.bn_relu_maxpool(x, stats)
    filters = activation((4, 5, 3, 3), dtype, layout)
    du, y = (activation((2, 4, 2, 2), dtype, layout) for _ in range(2))
    image, more = (activation((2, 5, 4, 4), dtype, layout) for _ in range(2))
    y_stats = OPS.bn_stats(y, None, None, 1e-5)
    y_sums = torch.randn(SUMS_ROWS, 4)
    square = activation((6, 5, 1, 1), dtype, layout)
    photo, stem = activation((2, 3, 5, 4), dtype, layout), activation((4, 3, 7, 7), dtype, layout)
    pixels = torch.randn(pixels_shape(2, 5, 4)).to(dtype)
    levels, taps, more_levels = (
        torch.randint(-128, 128, shape, dtype=torch.int8).to(memory_format=LAYOUTS[layout])
        for shape in ((2, 5, 4, 3), (4, 5, 3, 3), (2, 4, 4, 3))
    )
    border, vector = levels[0, :, 0, 0].clone(), 10 * torch.randn(4)
    small = torch.float16 if dtype == torch.float32 else dtype
    return {
        "bn_stats": [(x, weight, bias, 1e-5), (x, None, None, 1e-5)],
        "bn_running_stats": [(mean, var, weight, bias, 1e-5), (mean, var, None, None, 1e-5)],
        "bn_update_running_": [(mean, var, stats, 24, 0.1)],
        "bn_act": [
            (x, stats, None, None, True),
            (x, stats, z, None, True),
            (x, stats, z, None, False),
            (x, stats, r, r_stats, True),
        ],
        "bn_act_backward_reduce": [
            (grad, x, None, stats, None, None, True),
            (grad, x, z, stats, None, None, True),
            (grad, x, z, stats, r, r_stats, True),
            (grad, x, None, stats, r, r_stats, False),
        ],
        "bn_act_backward_reduce_": [
            (grad, x, z, stats, None, None),
            (grad, x, z, stats, r, r_stats),
        ],
        "bn_act_backward_apply": [
            (grad, x, stats, sums, None, None, None, True),
            (grad, x, stats, None, None, None, None, False),
            (grad, x, stats, sums, r, r_stats, r_sums, False),
        ],
        "bn_act_backward_apply_": [
            (grad, x, stats, sums, None, None, None, False),
            (grad, x, stats, sums, r, r_stats, r_sums, False),
        ],
        "bn_relu_maxpool": [(x, stats)],
        "bias_relu_maxpool": [(x, bias), (x, None)],
        "bn_relu_maxpool_backward_reduce": [(pooled, index, x, stats)],
        "bn_relu_maxpool_backward_apply": [(pooled, index, x, stats, sums), (pooled, index, x, stats, None)],
        "global_avg_pool": [(x,)],
        "global_avg_pool_backward": [(activation((2, 5, 1, 1), dtype), 3, 4)],
        "conv_fwd": [
            (x, None, None, None, False, filters, 2, None, None, 1e-5, False),
            (x, stats, None, None, True, filters, 1, torch.randn(4), torch.randn(4), 1e-5, True),
            (x, stats, r, None, True, square, 1, None, None, 1e-5, True),
            (x, stats, r, r_stats, True, square, 1, None, None, 1e-5, True),
        ],
        "conv_dgrad": [
            (du, None, None, None, filters, 2, 4, 4, None, 0, None, None, False, False),
            (du, y, y_stats, y_sums, filters, 2, 4, 4, None, 0, image, stats, True, True),
            (du, None, y_stats, None, filters, 2, 4, 4, activation((2, 7, 2, 2), dtype, layout), 1)
            + (image, stats, True, False),
            (du, y, y_stats, y_sums, filters, 2, 4, 4, more, 0, None, None, False, False),
        ],
        "conv_wgrad": [
            (du, None, None, None, image, None, False, filters, 2),
            (du, y, y_stats, y_sums, image, stats, True, filters, 2),
        ],
        "conv_bias_act": [
            (image, filters, y_stats[0], du, True, 2),
            (x, square, None, activation((2, 6, 4, 3), dtype, layout), False, 1),
            (x, filters, None, None, True, 1),
        ],
        "bottleneck_infer": [
            (
                x,
                activation((4, 5, 1, 1), dtype, layout),
                torch.randn(4),
                activation((4, 4, 3, 3), dtype, layout),
                torch.randn(4),
                activation((5, 4, 1, 1), dtype, layout),
                torch.randn(5),
            )
        ],
        "conv_int8": [
            (levels, border, taps, vector.int(), vector, vector, more_levels, 0.5, -9.0, 1, torch.int8),
            (levels, border, taps[..., :1, :1].contiguous(), vector.int(), vector, vector)
            + (None, 0.0, 0.0, 2, dtype),
        ],
        "quantize_int8": [(x, 0.1, 3)],
        "stem_conv": [
            (photo, stem, torch.randn(4), torch.randn(4), 1e-5, True, dtype),
            (photo.float(), stem.float(), None, None, 1e-5, False, small),
        ],
        "stem_bias_act": [
            (photo, stem, torch.randn(4), None, None, True, dtype),
            (photo.to(torch.uint8), stem.float(), None, [9.0, 8.0, 7.0], [3.0, 2.0, 1.0], False, small),
        ],
        "stem_wgrad": [(activation((2, 4, 3, 2), dtype, layout), pixels, stem, 5, 4)],
        "cast_weights": [([activation(layout=layout), activation((4, 3, 1, 1), layout=layout)], small)],
    }[name]
