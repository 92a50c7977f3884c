"""What a run came to, epoch by epoch: on a terminal, as CSV, for TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedres.training import files

CSV = "log.csv"
BOARD = "tensorboard"


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; errors from 0 to 1.

    Args:
        number: from 1.
        iteration: how many steps the run has taken.
        lr: of the last step.
        train_loss: mean over the images trained on, augmented, as the weights changed.
        train_error: likewise.
        validation_error: on the images held out; None if none are.
        test_error: on the test images.
        test_loss: likewise.
        tested: how many those are.
        images_per_second: of training, over all processes.
        seconds: of the run so far, without pauses.
    """

    number: int
    iteration: int
    lr: float
    train_loss: float
    train_error: float
    validation_error: float | None
    test_error: float
    test_loss: float
    tested: int
    images_per_second: float
    seconds: float

    @property
    def correct(self) -> int:
        """Test images that are classified right."""
        return round((1 - self.test_error) * self.tested)

    def __str__(self) -> str:
        held_out = "" if self.validation_error is None else f"  held out {self.validation_error:7.2%}"
        return (
            f"epoch {self.number:>3}  iteration {self.iteration:>6,}  lr {self.lr:.4f}"
            f"  loss {self.train_loss:.4f}  error {self.train_error:7.2%}{held_out}"
            f"  test error {self.test_error:7.2%}  {self.images_per_second:,.0f} img/s"
        )


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    """A row for each epoch.

    Raises:
        OSError: it can't be written; the file that was there is still there.
    """
    with files.atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [entry.name for entry in dataclasses.fields(Epoch)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, history))


class Board:
    """Scalars for TensorBoard, from the iteration on that a run goes on at.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder), purge_step=iteration + 1)

    def step(self, iteration: int, loss: float, lr: float) -> None:
        self.writer.add_scalar("step/loss", loss, iteration)
        self.writer.add_scalar("step/lr", lr, iteration)

    def epoch(self, epoch: Epoch) -> None:
        for name, value in dataclasses.asdict(epoch).items():
            if name not in ("number", "iteration") and value is not None:
                self.writer.add_scalar(f"epoch/{name}", value, epoch.iteration)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
