"""Localization by a regressor for each class (He et al. 2015, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.detection import anchors as boxes_of
from fusedres.detection.trunk import Trunk

Target = Mapping[str, Tensor]
_BETA = 1 / 9  # where smooth L1 turns from square to linear, in Faster R-CNN


class RegionHead(nn.Module):
    """A region proposal network that knows classes: at each anchor a score and a box for every one.

    A 3x3 convolution, then two sibling 1x1 convolutions, ``cls`` with K outputs an anchor, each a binary
    logistic regression of being of that class, and ``reg`` with 4K, a box for each class.

    Args:
        in_channels: C.
        num_classes: K, without a background.
        num_anchors: A, per position.
        hidden_channels: D, of the 3x3 convolution.

    Shapes:
        [N, C, h, w] -> logits [N, h * w * A, K] and deltas [N, h * w * A, K, 4], anchors in the order of
        :func:`fusedres.detection.anchors.square_anchors`
    """

    def __init__(
        self, in_channels: int, num_classes: int, num_anchors: int, hidden_channels: int = 512
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_anchors = num_anchors
        self.conv = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.cls = nn.Conv2d(hidden_channels, num_anchors * num_classes, 1)
        self.reg = nn.Conv2d(hidden_channels, num_anchors * num_classes * 4, 1)
        nn.init.kaiming_normal_(self.conv.weight)
        for layer in (self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
        for layer in (self.conv, self.reg):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # half of the anchors it is trained with are of one class
        nn.init.constant_(self.cls.bias, -math.log(2 * num_classes - 1))  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(features)
        deltas = self.reg(hidden).permute(0, 2, 3, 1)
        return self.logits(hidden), deltas.reshape(len(hidden), -1, self.num_classes, 4)

    def hidden(self, features: Tensor) -> Tensor:
        """What both siblings read: [N, C, h, w] -> [N, D, h, w]."""
        return F.relu(self.conv(features))

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores of every anchor: [N, D, h, w] -> [N, h * w * A, K]."""
        return self.cls(hidden).permute(0, 2, 3, 1).reshape(len(hidden), -1, self.num_classes)  # type: ignore[no-any-return]

    def rows(self, hidden: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
        """What ``hidden`` has at some anchors.

        Args:
            hidden: [N, D, h, w].
            image: [S], of each anchor.
            anchor: [S], its index in its image.

        Returns:
            [S, D]
        """
        return hidden.permute(0, 2, 3, 1).flatten(1, 2)[image, anchor // self.num_anchors]

    def logits_at(self, rows: Tensor, anchor: Tensor) -> Tensor:
        """The scores of some anchors alone: [S, D], [S] -> [S, K]."""
        shape = anchor % self.num_anchors
        weight, bias = self.cls.weight.flatten(1), self.cls.bias
        every = F.linear(rows, weight, bias).reshape(len(rows), self.num_anchors, self.num_classes)
        return every[torch.arange(len(rows), device=rows.device), shape]

    def deltas_at(self, rows: Tensor, anchor: Tensor, classes: Tensor) -> Tensor:
        """The regressors of one class at each of some anchors: [S, D], [S], [S] -> [S, 4]."""
        regressor = (anchor % self.num_anchors) * self.num_classes + classes
        weight = self.reg.weight.reshape(-1, 4, rows.shape[1])[regressor]
        bias = self.reg.bias.reshape(-1, 4)[regressor]  # type: ignore[union-attr]
        return torch.einsum("sd,scd->sc", rows, weight.to(rows.dtype)) + bias.to(rows.dtype)


class Prediction(NamedTuple):
    """What is where in N images, T guesses for each.

    Args:
        classes: [N, T], int64.
        scores: [N, T], that of the box, 0 to 1.
        boxes: [N, T, 4], in pixels.
    """

    classes: Tensor
    scores: Tensor
    boxes: Tensor


class Localizer(nn.Module):
    """Boxes of objects whose classes are known or guessed: a trunk with a :class:`RegionHead`.

    He et al. 2015, appendix C. In training ``samples`` anchors are drawn from each image, as many of them
    positive as negative. The loss of the classes is the binary cross-entropy of all K outputs, that of the
    boxes is smooth L1 of the regressor of the object's class at positive anchors; both are sums over outputs
    and means over the drawn anchors. The heads' K and 4K outputs are computed where they are needed alone:
    at the drawn anchors, and in a prediction the regressors of the predicted classes.

    Args:
        trunk: its last output is read.
        num_classes: K, without a background.
        anchor_sizes: sides of the square anchors at each position, in pixels.
        hidden_channels: of the head.
        samples: anchors drawn from each image, the paper's 8.
        negative_iou: an anchor that overlaps with each object by less is negative.
        positive_iou: one that overlaps with an object by as much is positive, like an object's best one.

    Shapes:
        images [N, 3, H, W], normalised. In training ``targets`` are N dicts of boxes [M, 4] and labels [M], 0
        to K - 1, and the result is a dict of the losses "loss_class" and "loss_box"; in eval it is a
        :class:`Prediction` of one guess.

    Raises:
        ValueError: an argument or a target outside of the above; names it.
    """

    def __init__(
        self,
        trunk: Trunk,
        num_classes: int,
        anchor_sizes: Sequence[float],
        *,
        hidden_channels: int = 512,
        samples: int = 8,
        negative_iou: float = 0.3,
        positive_iou: float = 0.7,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if not anchor_sizes or min(anchor_sizes) <= 0:
            raise ValueError(f"anchor_sizes must be sides in pixels, got {anchor_sizes}")
        if samples < 2:
            raise ValueError(f"samples must be 2 or more, half of them positive, got {samples}")
        if not 0 <= negative_iou <= positive_iou <= 1:
            raise ValueError(
                "negative_iou and positive_iou must be between 0 and 1, the first not above the second, "
                f"got {negative_iou} and {positive_iou}"
            )
        self.trunk = trunk
        self.head = RegionHead(trunk.out_channels, num_classes, len(anchor_sizes), hidden_channels)
        self.num_classes = num_classes
        self.anchor_sizes = tuple(anchor_sizes)
        self.stride = next(reversed(trunk.strides.values()))
        self.samples = samples
        self.negative_iou = negative_iou
        self.positive_iou = positive_iou

    def forward(
        self, images: Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | Prediction:
        if not self.training:
            return self.predict(images)
        if targets is None:
            raise ValueError("targets are needed in training")
        return self.losses(images, targets)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, [N, C, h, w], and the anchors, [P, 4]."""
        features = next(reversed(self.trunk(images).values()))
        h, w = features.shape[2:]
        return features, boxes_of.square_anchors(h, w, self.stride, self.anchor_sizes, images.device)

    def losses(
        self, images: Tensor, targets: Sequence[Target], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The losses, in either mode.

        Args:
            images: [N, 3, H, W].
            targets: as in the class.
            generator: of the drawn anchors; torch's own by default.
        """
        self._check(images, targets)
        features, anchors = self.features(images)
        hidden = self.head.hidden(features)
        drawn = [self._draw(anchors, target, generator) for target in targets]
        image = torch.cat([torch.full_like(d[0], i) for i, d in enumerate(drawn)])
        anchor, label = (torch.cat([d[i] for d in drawn]) for i in (0, 1))
        box = torch.cat([d[2] for d in drawn])
        rows = self.head.rows(hidden, image, anchor)

        logits = _wide(self.head.logits_at(rows, anchor))
        positive = label >= 0
        wanted = torch.zeros_like(logits)
        wanted[positive, label[positive]] = 1
        of_class = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

        at, of = anchor[positive], label[positive]
        deltas = _wide(self.head.deltas_at(rows[positive], at, of))
        of_box = F.smooth_l1_loss(
            deltas, boxes_of.encode(box, anchors[at]).to(deltas.dtype), beta=_BETA, reduction="sum"
        )
        count = max(1, len(anchor))
        return {"loss_class": of_class / count, "loss_box": of_box / count}

    def _draw(
        self, anchors: Tensor, target: Target, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors of one image, [S], their classes, [S], -1 for none, and the boxes of the first half."""
        boxes = target["boxes"].to(anchors.dtype)
        matches = boxes_of.match(anchors, boxes, self.negative_iou, self.positive_iou)
        positive, negative = boxes_of.sample(matches, self.samples, generator)
        of = matches[positive]
        label = torch.cat([target["labels"][of], torch.full_like(negative, -1)])
        return torch.cat([positive, negative]), label, boxes[of]

    @torch.no_grad()
    def predict(self, images: Tensor, classes: Tensor | None = None, top: int = 1) -> Prediction:
        """The box of each class at the anchor where that class scores best, cut off at the image's edge.

        Args:
            images: [N, 3, H, W], of any size.
            classes: [N, T], as a classifier predicts them; the ``top`` best by their own scores by default.
            top: T.
        """
        features, anchors = self.features(images)
        hidden = self.head.hidden(features)
        scores, anchor = _wide(self.head.logits(hidden)).max(1)
        if classes is None:
            classes = scores.topk(top, dim=1).indices
        n, t = classes.shape
        anchor, scores = anchor.gather(1, classes).flatten(), scores.gather(1, classes).sigmoid()
        image = torch.arange(n, device=images.device).repeat_interleave(t)
        rows = self.head.rows(hidden, image, anchor)
        deltas = _wide(self.head.deltas_at(rows, anchor, classes.flatten()))
        boxes = boxes_of.decode(deltas, anchors[anchor].to(deltas.dtype))
        height, width = images.shape[2:]
        limits = boxes.new_tensor([width, height, width, height])
        return Prediction(classes, scores, boxes.clamp_min(0).minimum(limits).reshape(n, t, 4))

    def _check(self, images: Tensor, targets: Sequence[Target]) -> None:
        if len(targets) != len(images):
            raise ValueError(f"targets must be one for each of {len(images)} images, got {len(targets)}")
        for index, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"targets[{index}] must have boxes [M, 4] and labels [M], "
                    f"got {list(boxes.shape)} and {list(labels.shape)}"
                )
        boxes, labels = (torch.cat([t[name] for t in targets]) for name in ("boxes", "labels"))
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if empty.any():
            raise ValueError(f"boxes must have x1 < x2 and y1 < y2, got {boxes[empty][0].tolist()}")
        unknown = (labels < 0) | (labels >= self.num_classes)
        if unknown.any():
            raise ValueError(
                f"labels must be from 0 to {self.num_classes - 1}, got {int(labels[unknown][0])}"
            )


def _wide(x: Tensor) -> Tensor:
    """At least fp32, as sums and boxes need it."""
    return x if x.dtype == torch.float64 else x.float()


def localized(prediction: Prediction, targets: Sequence[Target], iou: float = 0.5) -> Tensor:
    """Whether some guess has the class and the place of an object: ImageNet's criterion.

    Args:
        prediction: of N images.
        targets: of the same, as in :class:`Localizer`.
        iou: a box is right from this overlap.

    Returns:
        [N], bool; 1 minus its mean is the localization error.
    """
    right = []
    for classes, boxes, target in zip(prediction.classes, prediction.boxes, targets, strict=True):
        overlaps = boxes_of.box_iou(boxes, target["boxes"].to(boxes.dtype))
        right.append(((overlaps >= iou) & (classes[:, None] == target["labels"])).any())
    return torch.stack(right)


def mean_iou(prediction: Prediction, targets: Sequence[Any]) -> float:
    """The overlap of each image's first guess with its best object, whatever the classes: the mean."""
    overlaps = [
        boxes_of.box_iou(boxes[:1], target["boxes"].to(boxes.dtype)).max()
        for boxes, target in zip(prediction.boxes, targets, strict=True)
    ]
    return float(torch.stack(overlaps).mean())
