"""The stem's pooling: what a convolution can't take in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops

_OPS: Any = torch.ops.fusedres


def pool(x: Tensor, bias: Tensor | None) -> Tensor:
    """The maximum of relu(x + bias) over 3x3 windows, stride 2, padding 1."""
    least = ops.served_from("bias_relu_maxpool", x.device, x.dtype, ops.forced_backend())
    if least is not None and x.numel() >= least:
        return _OPS.bias_relu_maxpool.default(x, bias)  # type: ignore[no-any-return]
    if bias is not None:
        x = (x + bias.to(x.dtype).view(-1, 1, 1)).relu_()
    return F.max_pool2d(x, 3, 2, 1)
