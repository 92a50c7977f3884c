"""Whole nets: a training step and inference, fused against eager PyTorch, at a small batch."""

from __future__ import annotations

import pytest
import torch

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
