"""A convolution with all that follows it in a trained net, as modules of PyTorch's own operators.

This is what is saved, copied, exported and compiled. What runs on a machine is bound to it by ``program``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class ConvBiasAct(nn.Module):
    """relu(conv(x) + bias + residual).

    Args:
        weight: [K, C / groups, R, S].
        bias: [K], or None.
        stride, padding, dilation, groups: of nn.Conv2d.
        relu: whether a ReLU follows.

    Shapes:
        [N, C, H, W] (and [N, K, P, Q]) -> [N, K, P, Q]
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        *,
        relu: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.groups, self.relu = groups, relu

    @property
    def op(self) -> str:
        """What it computes, in words."""
        return "conv + bias" + " + ReLU" * self.relu

    def extra_repr(self) -> str:
        filters, channels, *side = self.weight.shape
        return (
            f"{channels * self.groups}, {filters}, kernel_size={tuple(side)}, stride={self.stride}, "
            f"padding={self.padding}, relu={self.relu}"
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        """``reuse``: the residual's memory may be written over; these operators don't."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y + residual
        return y.relu() if self.relu else y


class Stem(ConvBiasAct):
    """A convolution with a ReLU, and the maximum over 3x3 windows, stride 2, padding 1, behind it.

    Shapes:
        [N, C, H, W] -> [N, K, P, Q]
    """

    @property
    def op(self) -> str:
        return f"{super().op} + max pool"

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        return F.max_pool2d(super().forward(x), 3, 2, 1)
