"""Whole nets: a training step and inference, fused against eager PyTorch, at a small batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.cli.bench import check, eager, workload
from fusedres.cli.bench.sides import Converted

BATCH = 4
IMAGE_SIZE = 224
STEPS = {"train": workload.training_step, "inference": workload.inference_step}


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model(model: str, dtype: torch.dtype, mode: str, implementation: str, measure, device) -> None:
    torch.manual_seed(0)
    batch = workload.make(BATCH, IMAGE_SIZE, dtype, torch.channels_last, device, seed=0)
    nets = {"fused": getattr(fusedres, model)(), "eager": eager.build(model)[0]}
    for net in nets.values():
        net.to(device=device, memory_format=torch.channels_last)
    workload.prepare(nets["eager"], batch.images)
    nets["fused"].load_state_dict(nets["eager"].state_dict())
    for net in nets.values():
        net.train(mode == "train")
    expected = check.reference(nets["eager"], batch, mode)
    if mode == "inference":
        nets = {
            "fused": fusedres.optimize_for_inference(nets["fused"], dtype),
            "eager": Converted(nets["eager"], dtype),
        }
    errors = {name: check.errors(check.observe(net, batch, mode), expected) for name, net in nets.items()}
    failure = check.failure(errors["fused"], errors["eager"], dtype)
    assert failure is None, str(failure)

    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    measure(
        STEPS[mode](nets[implementation], batch),
        f"{model} {mode}, batch {BATCH}, {bits}",
        implementation,
        dtype,
        shape=list(batch.images.shape),
        bytes=batch.images.nbytes,
        error=max(errors[implementation].worst_output, errors[implementation].worst_gradient or 0.0),
    )


def _under_autocast(net: nn.Module, batch: workload.Workload) -> Callable[[Tensor], Tensor]:
    def forward(images: Tensor) -> Tensor:
        with batch.autocast():
            return net(images)

    return forward


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_converted(dtype: torch.dtype, mode: str, implementation: str, measure, device) -> None:
    """torchvision's ResNet-50, converted, at batch 1, where there is least to gain."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    batch = workload.make(1, IMAGE_SIZE, dtype, torch.channels_last, device, seed=0)
    plain = models.resnet50().to(device=device, memory_format=torch.channels_last)
    workload.prepare(plain, batch.images)
    plain.train(mode == "train")
    nets = {"fused": fusedres.convert(plain, inplace=False), "eager": plain}
    expected = check.reference(plain, batch, mode)
    steps, errors = {}, {}
    for name, net in nets.items():
        run = net if mode == "train" else _under_autocast(net, batch)
        errors[name] = check.errors(check.observe(run, batch, mode), expected)
        steps[name] = STEPS[mode](run, batch)
    failure = check.failure(errors["fused"], errors["eager"], dtype)
    assert failure is None, str(failure)

    other = "eager" if implementation == "fused" else "fused"
    bits = "bf16" if dtype == torch.bfloat16 else "fp32"
    measure(
        steps[implementation],
        f"converted resnet50 {mode}, batch 1, {bits}",
        implementation,
        dtype,
        against=(other, steps[other]),
        shape=list(batch.images.shape),
        error=max(errors[implementation].worst_output, errors[implementation].worst_gradient or 0.0),
    )
