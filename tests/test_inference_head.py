"""A trained net's average pool and classifier on a CPU, in bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.inference import onednn
from fusedres.inference.prepared import Prepared

pytestmark = pytest.mark.skipif(
    bool(onednn.unavailable(torch.bfloat16)), reason="oneDNN has no fast bfloat16 on this CPU"
)


def test_explained():
    model = fusedres.optimize_for_inference(fusedres.ResNet18().eval(), torch.bfloat16)
    steps = {step.layer: step for step in fusedres.explain(model, (2, 3, 64, 64), torch.bfloat16)}
    assert steps["fc"].implementation == "onednn"
    assert "window" in steps["avgpool"].reason

    model = fusedres.optimize_for_inference(fusedres.ResNet18().eval())
    steps = {step.layer: step for step in fusedres.explain(model, (2, 3, 64, 64))}
    assert steps["fc"].implementation == "aten" and "window" not in steps["avgpool"].reason


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (13, 9), (40, 32)], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_as_exact_as_eager(batch, size):
    torch.manual_seed(0)
    features = torch.rand(batch, 512, *size).bfloat16().to(memory_format=torch.channels_last)
    pool, linear = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000).bfloat16()
    with torch.inference_mode():
        bound = onednn.bind_average_pool(pool, features)
        pooled = bound.run(features, *bound.constants)
        check(pooled, pool(features), pool(features.double()))

        flat = pooled.flatten(1)
        bound = onednn.bind_linear(linear, flat, Prepared())
        logits = bound.run(flat, *bound.constants)
        check(logits, linear(flat), copy.deepcopy(linear).double()(flat.double()))


def check(found: Tensor, eager: Tensor, expected: Tensor) -> None:
    """The error is eager's, but for a rounding here or there."""
    assert found.dtype == eager.dtype and found.shape == eager.shape
    ours, theirs = ((y.double() - expected).abs() for y in (found, eager))
    assert ours.mean() <= 1.1 * theirs.mean() and ours.max() <= 2 * theirs.max()
