"""Anchors: where they lie, what they are matched with, and boxes in terms of them.

A box is x1, y1, x2, y2 in pixels of the image, with x2 and y2 just outside, so its width is x2 - x1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BACKGROUND, IGNORED = -1, -2
# a box of more than this times its anchor's side is taken for it, so that exp doesn't overflow
_LARGEST = math.log(1000 / 16)


def square_anchors(
    height: int, width: int, stride: int, sizes: Sequence[float], device: torch.device | None = None
) -> Tensor:
    """Squares around the middle of every position's stride x stride pixels, the same at each.

    Args:
        height: of the feature map.
        width: likewise.
        stride: pixels of the image per position.
        sizes: their sides in pixels.
        device: of the result.

    Returns:
        [height * width * len(sizes), 4], fp32, ordered by y, x and size.
    """
    ys, xs = (stride * (torch.arange(n, device=device) + 0.5) for n in (height, width))
    halves = torch.tensor(sizes, dtype=torch.float32, device=device) / 2
    y, x, half = torch.meshgrid(ys, xs, halves, indexing="ij")
    return torch.stack([x - half, y - half, x + half, y + half], dim=-1).reshape(-1, 4)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other: [M, 4], [P, 4] -> [M, P]."""
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    common = (high - low).clamp_min(0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others)]
    return common / (areas[0][:, None] + areas[1] - common)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """What a regressor has to give for a box at an anchor: [..., 4], [..., 4] -> [..., 4].

    The shift of the centre in sides of the anchor and the logarithms of the ratios of the sides, as in R-CNN.
    """
    low, sides = anchors[..., :2], anchors[..., 2:] - anchors[..., :2]
    box_sides = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + box_sides / 2 - low - sides / 2) / sides
    return torch.cat([shift, torch.log(box_sides / sides)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The boxes that a regressor means, the inverse of :func:`encode`: [..., 4], [..., 4] -> [..., 4]."""
    sides = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + sides / 2 + deltas[..., :2] * sides
    half = sides * torch.exp(deltas[..., 2:].clamp_max(_LARGEST)) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def match(anchors: Tensor, boxes: Tensor, negative_iou: float, positive_iou: float) -> Tensor:
    """Which box each anchor stands for.

    That with which it overlaps most, if by ``positive_iou`` or more, or if no anchor overlaps with that box
    more.

    Args:
        anchors: [P, 4].
        boxes: [M, 4], M may be 0.
        negative_iou: an anchor that overlaps with each box by less is background, unless it is a box's best.
        positive_iou: see above.

    Returns:
        [P], int64: a box's index, BACKGROUND or, in between, IGNORED.
    """
    if len(boxes) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    overlaps = box_iou(boxes, anchors)
    most, index = overlaps.max(0)
    matches = torch.where(most >= negative_iou, IGNORED, BACKGROUND)
    best = overlaps.amax(1, keepdim=True)
    of_box, at = torch.nonzero((overlaps == best) & (best > 0), as_tuple=True)
    matches[at] = of_box
    return torch.where(most >= positive_iou, index, matches)


def sample(matches: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Positive and negative anchors at random, as many of either (He et al. 2015, appendix C).

    Args:
        matches: [P], of one image, by :func:`match`.
        count: of both together, at most.
        generator: of the choice; torch's own by default.

    Returns:
        Indices of positive and of negative anchors, both [n] with n <= count / 2.
    """
    positive, negative = (torch.nonzero(m).flatten() for m in (matches >= 0, matches == BACKGROUND))
    n = min(len(positive), len(negative), count // 2)
    chosen = [
        group[torch.randperm(len(group), generator=generator, device=group.device)[:n]]
        for group in (positive, negative)
    ]
    return chosen[0], chosen[1]
