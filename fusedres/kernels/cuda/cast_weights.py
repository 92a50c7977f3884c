"""All weights in 16 bits, in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.cuda import launch


def cast_weights(weights: list[Tensor], out: list[Tensor]) -> None:
    entries = []
    for weight, cast in zip(weights, out, strict=True):
        outer, inner, height, width = weight.shape
        taps = height * width
        if weight.is_contiguous(memory_format=torch.channels_last):
            inner, taps = inner * taps, 1
        entries.append((weight.data_ptr(), cast.data_ptr(), outer, inner, taps))
    launch.run("cast_weights", out[0], launch.DTYPES[out[0].dtype], entries)
