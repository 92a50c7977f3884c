"""What is measured: the models' common weights, the input, and one step of each mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1000
LEARNING_RATE = 1e-4  # small: the steps of a measurement must not lead the weights astray
MOMENTUM = 0.9
FP16_LOSS_SCALE = 1024.0
# momentum of the running statistics meanwhile: less than 1, for another step on the same images to
# move them, or a check would not see how they are updated
_PREPARING = 0.8

Step = Callable[[], None]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """A batch and how to compute with it.

    Args:
        images: [N, 3, H, W], fp32, in the layout to measure.
        labels: [N], int64.
        dtype: of the convolutions: fp32, bf16 or fp16; in training the latter two by autocast over fp32
            weights.
    """

    images: Tensor
    labels: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def loss_scale(self) -> float:
        return FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def to(self, dtype: torch.dtype) -> Workload:
        """The same batch computed in fp32 or fp64 throughout."""
        return Workload(self.images.to(dtype), self.labels, dtype)


def make(
    batch: int,
    image_size: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device,
    seed: int,
    classes: int = CLASSES,
) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return Workload(images.to(device, memory_format=layout), labels.to(device), dtype)


@torch.no_grad()
def prepare(model: nn.Module, images: Tensor) -> None:
    """Give a model with random weights tame gradients, and running statistics that fit ``images``.

    Gamma of the last batch norm in every block is set to one over the number of blocks. At 1, rounding
    errors grow so much on their way through the blocks that no check could tell them from a mistake.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    ends = [getattr(block, "bn3", None) or getattr(block, "bn2", None) for block in model.modules()]
    lasts = [end for end in ends if end is not None]
    for last in lasts:
        nn.init.constant_(last.weight, 1 / len(lasts))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = _PREPARING
    model.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def loss(model: nn.Module, workload: Workload) -> tuple[Tensor, Tensor]:
    """Logits, and the cross entropy times the workload's loss scale."""
    with workload.autocast():
        logits = model(workload.images)
        return logits, F.cross_entropy(logits, workload.labels) * workload.loss_scale


def training_step(model: nn.Module, workload: Workload) -> Step:
    """Forward, cross entropy, backward, SGD with momentum, gradients set to None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE / workload.loss_scale, momentum=MOMENTUM)

    def step() -> None:
        loss(model, workload)[1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(forward: Forward, workload: Workload) -> Step:
    """From fp32 images to logits, under torch.inference_mode."""

    def step() -> None:
        with torch.inference_mode():
            forward(workload.images)

    return step
