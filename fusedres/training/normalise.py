"""What a net's inputs are made of pixels by: part of a trained net, and kept in its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_KEYS = ("mean", "std")


@dataclass(frozen=True)
class Normalisation:
    """(pixels - mean) / std, of pixels from 0 to 1.

    Args:
        mean: [C, 1, 1], per channel, or [C, H, W], the per-pixel mean of He et al. 2015, section 3.4.
        std: [C, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised images.

        Args:
            pixels: [N, C, H, W], fp32, from 0 to 1. A mean of another size is resized to theirs.
        """
        mean = self.mean.to(pixels.device)
        if mean.shape[1:] not in ((1, 1), pixels.shape[2:]):
            mean = F.interpolate(mean[None], size=pixels.shape[2:], mode="bilinear", align_corners=False)[0]
        return (pixels - mean) / self.std.to(pixels.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _KEYS}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Normalisation:
        """The normalisation that a checkpoint has under "normalisation".

        Raises:
            ValueError: it is none.
        """
        mean, std = (state.get(name) for name in _KEYS)
        if not (
            isinstance(mean, Tensor)
            and isinstance(std, Tensor)
            and mean.dim() == std.dim() == 3
            and std.shape == (len(mean), 1, 1)
        ):
            raise ValueError("a normalisation must have a mean [C, H, W] and a std [C, 1, 1]")
        return cls(mean, std)


IMAGENET = Normalisation(
    torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
)
