"""PyTorch Lightning: a LightningModule around a fused net."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_nets import CLASSES, images
from fused_ops import FusedOps
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from twin_steps import assert_as_exact, left_behind, norms_of, short_twins

pytest.importorskip("lightning")
lightning: Any = importlib.import_module("lightning.pytorch")


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        return functional.cross_entropy(self.net(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def by_hand(net: nn.Module, batches: Any, half: bool = False) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, labels in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = functional.cross_entropy(net(x.to(next(net.parameters()).dtype)), labels)
        loss.backward()
        optimizer.step()
    return left_behind(net)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["basic", "timm basic"])
@pytest.mark.filterwarnings("ignore")
def test_fit(name, precision, tmp_path: Path, reference):
    eager, fused = short_twins(name)
    exact, _ = (net.double() for net in short_twins(name))
    batches = DataLoader(TensorDataset(images(12), torch.arange(12) % CLASSES), batch_size=4)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with FusedOps() as ops:
        trainer.fit(Classifier(fused), batches)
    assert ops.batch_norms == 3 * norms_of(fused)
    loaded = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert {f"net.{key}" for key in eager.state_dict()} == set(loaded["state_dict"])
    expected = by_hand(eager, batches, precision == "bf16-mixed")
    assert_as_exact(left_behind(fused), expected, by_hand(exact, batches))
