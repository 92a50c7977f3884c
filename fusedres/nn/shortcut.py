"""The shortcuts of a residual block."""

from __future__ import annotations

from typing import Literal, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.nn.casts import convolve
from fusedres.nn.fuse import altered, traced

Zeros = Literal["end", "split"]
_POOLS = (nn.AvgPool2d, nn.Identity)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the argument ``name`` has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def shortcut(downsample: nn.Module | None, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """The shortcut of a block, and the norm that it still has to go through: ``batch_norm_act``'s last two.

    Args:
        downsample: None for an identity; the norm of a projection is left to the end of the block, to be
            fused there.
        x: [N, C, H, W], the block's input.
    """
    if downsample is None:
        return x, None
    if is_projection(downsample) and altered(downsample) is None and traced(x) is None:
        source = pooled(downsample, x)
        return convolve(downsample[-2], x if source is None else source), downsample[-1]
    return downsample(x), None


def is_projection(downsample: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Whether a shortcut is a convolution and a norm, or these behind an average pool, as in ResNet-D."""
    if type(downsample) is not nn.Sequential:
        return False
    return len(downsample) == 2 or (len(downsample) == 3 and isinstance(downsample[0], _POOLS))


def pooled(downsample: nn.Module | None, x: Tensor) -> Tensor | None:
    """What a projection behind an average pool gets; None for any other shortcut, which gets ``x``."""
    if not is_projection(downsample) or len(downsample) == 2:
        return None
    source = downsample[0](x)
    return None if source is x else source  # no tensor of its own, no gradient of its own


class PadShortcut(nn.Module):
    """Option A of He et al. 2015, section 3.3: subsampling, and zeros for the new channels.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the subsampling.
        zeros: "end" puts the zero channels behind the input's, "split" half of them on either side.

    Shapes:
        [N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]

    Raises:
        ValueError: an unknown ``zeros``, or fewer channels out than in.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, zeros: Zeros = "end") -> None:
        super().__init__()
        one_of("zeros", zeros, ("end", "split"))
        if planes < inplanes:
            raise ValueError(f"planes must be at least inplanes, {inplanes}, got {planes}")
        self.stride = stride
        before = (planes - inplanes) // 2 if zeros == "split" else 0
        self.padding = (before, planes - inplanes - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}"
