"""Whole nets: a training step and inference, at a small batch."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from compare import BITS, COMPILE, EAGER, FUSED, LAYOUTS, SIDES, Case, Side, in_layout
from torch import Tensor, nn

import fusedres
from fusedres.cli import roofline
from fusedres.cli.bench import check, eager, workload
from fusedres.cli.bench.sides import Converted, frozen
from fusedres.cli.bench.workload import Workload

BATCH = 4
CONVERTED_ROUNDS = 40  # what may differ is small
IMAGE_SIZE = 224
LEVEL = {"train": "block", "inference": "conv-pool"}  # of fusion, that is built

each_mode = pytest.mark.parametrize("mode", list(LEVEL))
each_dtype = pytest.mark.parametrize("dtype", list(BITS), ids=list(BITS.values()))


def case(
    model: str,
    plain: nn.Module,
    fused: nn.Module,
    batch: Workload,
    mode: str,
    names: tuple[str, ...] = SIDES,
    optimised: bool = True,
) -> Case:
    """Sides of the same net: ``plain`` and ``fused`` have the same values.

    ``optimised``: for inference, whether the fused side is what optimize_for_inference makes of ``fused``.
    """

    def make(name: str) -> Side:
        images = batch.images.contiguous(memory_format=LAYOUTS[name])
        own = dataclasses.replace(batch, images=images)
        net = fused if name == FUSED else plain
        if mode == "train":
            net = in_layout(net, name)
            step = workload.training_step(net, own)
            return Side(step, functools.partial(check.observe, net, own, mode))
        run = _inference(name, net, own, optimised)
        return Side(workload.inference_step(run, own), functools.partial(check.infer, run, own))

    for net in (plain, fused):
        net.to(batch.device, memory_format=torch.channels_last).train(mode == "train")
    dtype = str(batch.dtype).removeprefix("torch.")
    n, _, size, _ = batch.images.shape
    work = [placed.work for placed in roofline.passes(LEVEL[mode], model, n, size, dtype)]
    sides = {name: functools.partial(make, name) for name in names}
    return Case(sides, check.reference(plain, batch, mode), batch.images.shape, batch.dtype, work)


def _inference(name: str, net: nn.Module, batch: Workload, optimised: bool) -> Callable[[Tensor], Tensor]:
    if name == FUSED and optimised:
        return fusedres.optimize_for_inference(net, batch.dtype)
    if name == COMPILE:
        torch.compiler.reset()
        return frozen(net, batch)
    return Converted(in_layout(net, name), batch.dtype)


def random_images(batch: int, dtype: torch.dtype, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return workload.make(batch, IMAGE_SIZE, dtype, torch.channels_last, device, seed=0)


@pytest.mark.parametrize("side", SIDES)
@each_mode
@each_dtype
def test_model(model: str, dtype: torch.dtype, mode: str, side: str, measure, device) -> None:
    def make() -> Case:
        batch = random_images(BATCH, dtype, device)
        plain = eager.build(model)[0].to(device)
        workload.prepare(plain, batch.images)
        fused = getattr(fusedres, model)()
        fused.load_state_dict(plain.state_dict())
        return case(model, plain, fused, batch, mode)

    measure(f"{model}, {BITS[dtype]}, batch {BATCH}, {mode}", side, make)


@pytest.mark.parametrize("side", [FUSED, EAGER])
@each_mode
@each_dtype
def test_converted(dtype: torch.dtype, mode: str, side: str, measure, device) -> None:
    """torchvision's ResNet-50, converted and as it is, at batch 1, where there is least to gain."""
    models = pytest.importorskip("torchvision.models")

    def make() -> Case:
        batch = random_images(1, dtype, device)
        plain = models.resnet50().to(device)
        workload.prepare(plain, batch.images)
        fused = fusedres.convert(copy.deepcopy(plain))
        return case("resnet50", plain, fused, batch, mode, (FUSED, EAGER), optimised=False)

    measure(f"converted resnet50, {BITS[dtype]}, batch 1, {mode}", side, make, rounds=CONVERTED_ROUNDS)
