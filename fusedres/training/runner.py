"""A run in a folder: begun, saved as it goes, and gone on with."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from fusedres.training import checkpoint, files, log
from fusedres.training.data import Data
from fusedres.training.distributed import Processes
from fusedres.training.log import Epoch
from fusedres.training.loop import Trainer
from fusedres.training.run import Run

RECIPE = "recipe.yaml"


class Interrupted(Exception):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and stopped between two steps."""


@dataclass(frozen=True)
class Settings:
    """What doesn't change a run's outcome.

    Args:
        device: where it runs.
        out: the folder that takes its files; None to write none.
        save_every: iterations between two checkpoints, besides those after every epoch.
        board: whether to write for TensorBoard.
    """

    device: torch.device
    out: Path | None = None
    save_every: int = 1000
    board: bool = False


def resumable(out: Path) -> Path | None:
    """The checkpoint of the run in a folder; None if it has none."""
    path = out / checkpoint.LAST
    return path if path.exists() else None


def train(
    run: Run,
    data: Data,
    settings: Settings,
    processes: Processes | None = None,
    state: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Train, and save as it goes; yields after every epoch.

    Writes last.pt, with all that the run goes on from; log.csv; and at its end model.safetensors, the
    weights alone. Only the first process writes.

    Args:
        run: what to do.
        data: the images that it names.
        settings: where and how.
        processes: this one and the others.
        state: what ``checkpoint.load`` gave, to go on from; None to begin.

    Raises:
        DataError: an image can't be read.
        ValueError: the run doesn't fit the images, or they are others than when it began.
        OSError: a file can't be written; the last checkpoint stays.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        Interrupted: the run was asked to stop; its checkpoint is up to date.
    """
    processes = processes or Processes()
    trainer = Trainer(run, data, settings.device, processes)
    if state is not None:
        trainer.load_state_dict(state)
    writer = Writer(trainer, settings.out if processes.is_first else None)
    board = None
    if settings.board and writer.out is not None:
        board = log.Board(writer.out / log.BOARD, trainer.progress.iteration)
        trainer.watch = board.step
    closed = contextlib.nullcontext() if board is None else contextlib.closing(board)
    with stop_between_steps(alone=processes.count == 1) as stop, closed:
        for epoch in trainer:
            due = epoch is not None or trainer.progress.iteration % settings.save_every == 0
            if due or stop.asked:
                writer.save()
            if epoch is not None:
                if board is not None:
                    board.epoch(epoch)
                yield epoch
            if stop.asked and not trainer.is_done:
                raise Interrupted
    writer.finish()


class Writer:
    """The files of a run; of a process that has none to write it only takes part in gathering the state."""

    def __init__(self, trainer: Trainer, out: Path | None) -> None:
        self.trainer, self.out = trainer, out
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            with files.atomic(out / RECIPE) as temporary:
                temporary.write_text(
                    yaml.safe_dump(_plain(trainer.run.state_dict()["recipe"]), sort_keys=False)
                )

    def save(self) -> None:
        if self.out is None and self.trainer.processes.count == 1:
            return
        state = self.trainer.state_dict()
        if self.out is not None:
            checkpoint.save(self.out / checkpoint.LAST, state)
            log.write_csv(self.out / log.CSV, self.trainer.history)

    def finish(self) -> None:
        if self.out is not None:
            checkpoint.save_weights(
                self.out / checkpoint.WEIGHTS, self.trainer.kept.state_dict(), self.trainer.facts()
            )


def _plain(value: Any) -> Any:
    """What YAML has a name for."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def stop_between_steps(alone: bool) -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM ask to stop after the step under way; a second time, at once.

    Args:
        alone: whether there is only one process; several would stop after different steps, and wait for
            each other for ever, so there Ctrl-C stops at once.
    """
    stop = Stop()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
