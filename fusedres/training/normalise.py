"""What a net's inputs are made of pixels by: part of a trained net, and kept in its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mean = Literal["per_pixel", "per_channel", "imagenet"]
_KEYS = ("mean", "std")
_LEAST_STD = 1 / 255  # a channel that is the same everywhere is not blown up


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


def measure(batches: Iterable[Tensor], mean: Mean) -> Normalisation:
    """The normalisation of images like these.

    Args:
        batches: images [N, 3, H, W], fp32, from 0 to 1.
        mean: "per_pixel" is their mean image, and nothing is divided by; "per_channel" the mean of every
            channel, over its deviation; "imagenet" ImageNet's, and ``batches`` is not looked at.
    """
    if mean == "imagenet":
        return IMAGENET
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for images in batches:
        count += len(images)
        total = total + images.double().sum(0)
        squares = squares + images.double().square().sum(0)
    of_pixels = total / count
    if mean == "per_pixel":
        return Normalisation(of_pixels.float(), torch.ones(3, 1, 1))
    average = of_pixels.mean((1, 2), keepdim=True)
    variance = (squares / count).mean((1, 2), keepdim=True) - average.square()
    return Normalisation(average.float(), variance.clamp_min(0).sqrt().clamp_min(_LEAST_STD).float())
