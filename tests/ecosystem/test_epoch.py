"""Training goes on from trained weights alike: eager PyTorch, converted, and converted and compiled."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar_data import images, trained
from fused_ops import FusedOps
from torch import Tensor, nn

import fusedres
from fusedres.nn import PadShortcut

BATCH = 128


class TorchvisionCifar(nn.Module):
    """ResNet-20 (He et al. 2015, section 4.2) out of torchvision's blocks, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        block: Any = importlib.import_module("torchvision.models.resnet").BasicBlock
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inplanes = 16
        for stage, planes in enumerate((16, 32, 64), 1):
            blocks = []
            for stride in (1 if stage == 1 else 2, 1, 1):
                shortcut = None if stride == 1 else PadShortcut(inplanes, planes, stride, "split")
                blocks.append(block(inplanes, planes, stride, shortcut))
                inplanes = planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def batches(x: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, mirrored and shifted by up to 4 pixels: the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(len(x), generator=generator) for _ in range(steps * BATCH // len(x) + 1)]
    )
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        top, left = torch.randint(9, (2,), generator=generator).tolist()
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        batch = F.pad(x[chosen], (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]
        yield torch.where(mirrored, batch.flip(3), batch), labels[chosen]


def epoch(net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> float:
    """The mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    losses = []
    for batch, targets in batches(x, labels, steps):
        loss = F.cross_entropy(net.train()(batch.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Percent."""
    right = sum(
        int((net.eval()(a).argmax(1) == b).sum())
        for a, b in zip(x.split(1000), labels.split(1000), strict=True)
    )
    return 100 * right / len(x)


def compare(data: Path, x: Tensor, labels: Tensor, steps: int, tested: int, backend: str) -> None:
    eager = TorchvisionCifar()
    eager.load_state_dict(trained(data, 20))
    eager.to(memory_format=torch.channels_last)
    converted = fusedres.convert(eager, inplace=False, strict=True)
    assert [entry.fused for entry in fusedres.coverage(converted)] == 9 * [True]
    compiled = copy.deepcopy(converted)
    runs = {
        "eager": eager,
        "converted": converted,
        "compiled": torch.compile(compiled, fullgraph=True, backend=backend),
    }
    found = {}
    for name, net in runs.items():
        with FusedOps() if name == "converted" else torch.enable_grad() as calls:
            loss = epoch(net, x, labels, steps)
        if name == "converted":
            assert calls.batch_norms >= 12 * steps  # those of the largest activations
        net = compiled if name == "compiled" else net
        found[name] = loss, accuracy(net, *(t[:tested] for t in images(data, "cifar10_test.npz")))
        print(f"{name}: mean loss of {steps} steps {loss:.5f}, test accuracy {found[name][1]:.2f}%")
    for loss, right in found.values():
        assert loss == pytest.approx(found["eager"][0], rel=0.01)
        assert right == pytest.approx(found["eager"][1], abs=0.5)
    assert found["eager"][1] > 90


def test_the_first_steps(data):
    pytest.importorskip("torchvision")
    compare(data, *images(data, "cifar10_train_first10k.npz"), steps=6, tested=2000, backend="aot_eager")


@pytest.mark.full
def test_an_epoch(data):
    """All 50,000 images, if FUSEDRES_CIFAR10 is a folder with cifar10_train.npz; else 10,000 five times."""
    pytest.importorskip("torchvision")
    folder = os.environ.get("FUSEDRES_CIFAR10")
    train = (
        images(Path(folder), "cifar10_train.npz") if folder else images(data, "cifar10_train_first10k.npz")
    )
    compare(data, *train, steps=390, tested=10_000, backend="inductor")
