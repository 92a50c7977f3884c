"""A batch norm that fine-tuning leaves as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """A batch norm with fixed statistics, scale and shift: ``x * scale + shift`` in either mode.

    He et al. 2015, appendix A: the batch norms of a pretrained net are fixed while a detector is trained. The
    gradient passes to the input, there are no parameters. Buffers and keys are those of torchvision's
    FrozenBatchNorm2d, and an nn.BatchNorm2d's state_dict loads. The output has the dtype of the input, where
    torchvision's promotes 16 bits to its float32 buffers; so a block is fused under autocast, too.

    Args:
        num_features: C.
        eps: added to the variance.

    Shapes:
        [N, C, H, W] -> the same, in the same dtype
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return (x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
