"""Training steps of ResNet-18 and ResNet-50 at 64 px, batch 8, against float64 and eager PyTorch."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_ops import FusedOps
from torch import Tensor, nn

import fusedres
from fusedres import kernels
from fusedres.cli.bench.workload import prepare

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
CONVOLUTIONS = {"resnet18": 19, "resnet50": 52}  # behind the stem


def interpreted() -> contextlib.AbstractContextManager[Counter[str] | None]:
    """Seconds instead of minutes in Triton's interpreter; counts launches there."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from large_tiles import large_tiles

    return large_tiles()


def steps(
    model: nn.Module, images: Tensor, labels: Tensor, count: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of ``count`` steps of SGD, and the gradients of the last with the statistics after it."""
    # at 0.05 rounding grows so fast that eager PyTorch's own third loss is off by more than what is allowed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {name: p.grad for name, p in model.named_parameters()}
    return losses, found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def error(found: dict[str, Tensor], truth: dict[str, Tensor], which: Callable[[str], bool]) -> float:
    """Of all tensors together, relative."""
    pairs = [(found[name].double(), t) for name, t in truth.items() if which(name)]
    off = sum((f - t).square().sum() for f, t in pairs)
    return float((off / sum(t.square().sum() for _, t in pairs)).sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "count", [1, pytest.param(3, marks=pytest.mark.full)], ids=["one step", "three steps"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_training_step(name, count, backend):
    models = pytest.importorskip("torchvision", exc_type=ImportError).models
    if backend in kernels.unavailable():
        pytest.skip(kernels.unavailable()[backend])
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (8,))
    theirs = getattr(models, name)(num_classes=10).to(memory_format=torch.channels_last)
    prepare(theirs, images)
    ours = getattr(fusedres, name)(num_classes=10).to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    exact_losses, exact = steps(copy.deepcopy(theirs).double(), images.double(), labels, count)
    eager_losses, eager = steps(theirs, images, labels, count)
    with interpreted() as launches, fusedres.backend(backend), FusedOps() as ops:
        losses, found = steps(ours, images, labels, count)
    assert losses == pytest.approx(exact_losses, rel=1e-4)
    for which in (lambda n: "running" in n, lambda n: "running" not in n):
        # a value near 0 may pass a ReLU or not by rounding, and takes its whole gradient with it
        assert error(found, exact, which) <= 2 * error(eager, exact, which) + 1e-4
    assert ops.batch_norms == count * (CONVOLUTIONS[name] + 1)
    stems = count * (backend != "cpu")
    others = stems * CONVOLUTIONS[name]
    assert ops.calls["stem_conv"] == ops.calls["stem_wgrad"] == stems
    assert ops.calls["conv_fwd"] == ops.calls["conv_dgrad"] == ops.calls["conv_wgrad"] == others
    if INTERPRETED:
        of_stems = {"stem_conv_sync": stems, "stem_wgrad_sync": stems}
        assert launches == {"conv_fwd": others, "conv_dgrad_fp32": others, "conv_wgrad": others} | of_stems
