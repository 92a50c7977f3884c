"""The scores of images: what a net says of an image's views, averaged, and how often that is right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedres.cli import views
from fusedres.cli.errors import CommandError
from fusedres.cli.images import Images
from fusedres.cli.options import DTYPES
from fusedres.cli.views import FLIPPED, Protocol
from fusedres.inference import OptimizedResNet
from fusedres.training.normalise import Normalisation

TOP = 5


@dataclass(frozen=True)
class Member:
    """One net of an ensemble.

    Args:
        net: [N, 3, H, W], fp32 -> logits [N, classes], fp32.
        source: of its weights, for messages.
        normalise: its images.
        protocol: the views of an image that it scores.
    """

    net: OptimizedResNet
    source: str
    normalise: Normalisation
    protocol: Protocol


@torch.inference_mode()
def score(
    members: Sequence[Member], images: Images, batch: int, device: torch.device, logits: bool
) -> Iterator[tuple[list[int], Tensor]]:
    """Every member's scores of every image: some indices, and [images, members, classes], fp32 on the CPU.

    An image's scores are the mean over its views, of softmax probabilities or of logits. A view may be of
    any size, also a whole image: global average pooling and the linear classifier behind it commute, so a
    net on a larger image is the fully convolutional net of He et al. 2015, section 3.4, its class scores
    averaged over all positions.

    Args:
        members: nets of the same classes.
        images: read when they are needed; what can't be read is reported and left out.
        batch: views in a call of a net, at most. Those of one size go together.
        device: of the nets.
        logits: whether these are averaged.

    Raises:
        CommandError: no image can be read, or a net's outputs are not finite.
    """
    protocols = dict.fromkeys(member.protocol for member in members)
    # of whole images each may have its own size: more are read, so that some have the same
    at_a_time = min(batch if p.crops == "full" else max(1, batch // p.per_image()) for p in protocols)
    read = images.views(at_a_time, "evaluation", lambda pixels: {p: p.views(pixels) for p in protocols})
    for found in read:
        of_members = [
            _mean(member, [of_image[member.protocol] for of_image in found.values()], batch, device, logits)
            for member in members
        ]
        yield list(found), torch.stack(of_members, 1)


def _mean(
    member: Member, of_images: list[list[Tensor]], batch: int, device: torch.device, logits: bool
) -> Tensor:
    """[images, classes]; of_images: the views of each, [3, h, w], uint8"""
    alike: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, of_image in enumerate(of_images):
        for view in of_image:
            alike[view.shape].append((index, view))
    flip = member.protocol.flip
    step = max(1, batch // FLIPPED) if flip else batch
    indices: list[int] = []
    scores = []
    for same in alike.values():
        for start in range(0, len(same), step):
            part = same[start : start + step]
            x = torch.stack([view for _, view in part]).to(device)
            scores.append(_of_views(member, views.with_flips(x) if flip else x, batch, logits))
            indices += [index for index, _ in part] * (FLIPPED if flip else 1)
    of_views = torch.cat(scores)
    total = of_views.new_zeros(len(of_images), of_views.shape[1])
    return total.index_add_(0, torch.tensor(indices), of_views) / member.protocol.per_image()


def _of_views(member: Member, x: Tensor, batch: int, logits: bool) -> Tensor:
    """[N, 3, h, w], uint8 -> [N, classes], fp32 on the CPU"""
    parts = torch.split(x, batch)
    out = torch.cat([member.net(views.normalised(part, member.normalise)) for part in parts]).cpu()
    if not out.isfinite().all():
        dtype = next(name for name, dtype in DTYPES.items() if dtype == member.net.dtype)
        raise CommandError(f"{member.source} gives values that are not finite, in {dtype}")
    return out if logits else out.softmax(1)


class Tally:
    """How many images are right: of each side, the members and their mean, and of each class.

    Args:
        sides: their number.
        classes: likewise; with at most ``TOP``, top-5 is not counted.
    """

    def __init__(self, sides: int, classes: int) -> None:
        self.images = torch.zeros(classes, dtype=torch.int64)
        self.right = torch.zeros(sides, 1 + (classes > TOP), classes, dtype=torch.int64)  # top-1, top-5

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores: [N, sides, classes]; labels: [N]"""
        classes = len(self.images)
        self.images += labels.bincount(minlength=classes)
        first = scores.argmax(2) == labels[:, None]
        right = [first]
        if self.right.shape[1] > 1:
            # with the first: of several that are as high, topk may take others
            right.append(first | (scores.topk(TOP, 2).indices == labels[:, None, None]).any(2))
        for top, of_sides in enumerate(right):
            for side in range(len(self.right)):
                self.right[side, top] += labels[of_sides[:, side]].bincount(minlength=classes)

    def figures(self, side: int) -> dict[str, Any]:
        """top1 and, with enough classes, top5."""
        images = int(self.images.sum())
        return {
            name: {
                "correct": right,
                "accuracy": right / images,
                "error_percent": 100 * (images - right) / images,
            }
            for name, right in zip(("top1", "top5"), self.right[side].sum(1).tolist(), strict=False)
        }

    def per_class(self, side: int, names: list[str] | None) -> list[dict[str, Any]]:
        top5 = self.right[side, 1].tolist() if self.right.shape[1] > 1 else [None] * len(self.images)
        counted = zip(self.images.tolist(), self.right[side, 0].tolist(), top5, strict=True)
        return [
            {"class": i, "label": names[i] if names else None, "images": images, "top1": top1, "top5": in_5}
            for i, (images, top1, in_5) in enumerate(counted)
        ]
