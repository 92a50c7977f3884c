"""Several nets by one recipe on one data set: trained one after the other, each in a folder of its own."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedres.cli.bench import report
from fusedres.cli.experiment.paper import Reported
from fusedres.models.resnet import Shortcut
from fusedres.training import checkpoint, files, runner
from fusedres.training.data import Data, open_data
from fusedres.training.log import Epoch
from fusedres.training.loop import Trainer
from fusedres.training.recipe import Recipe
from fusedres.training.run import Precision, Run

PROBED, WARMUP = 6, 2  # steps that tell a net's speed
CURVES = "curves.csv"
Curves = Mapping[str, Sequence[Epoch]]


@dataclass(frozen=True)
class Entry:
    """A net of the comparison.

    Args:
        label: what it is called there, and its folder.
        model: its name.
        shortcut: None for the net's own.
    """

    label: str
    model: str
    shortcut: Shortcut | None = None


@dataclass(frozen=True)
class Series:
    """What is compared on what.

    Args:
        entries: the nets.
        recipes: by the labels of the nets; alike but for the model.
        data: see :func:`fusedres.training.data.open_data`.
        out: takes a folder for each net.
        epochs: of each; None for the recipe's length.
        budget: seconds in all, which decide on the epochs; None for none.
        seed: of every run.
        precision: of every run.
        device: where.
        readers: processes that read image files.
    """

    entries: Sequence[Entry]
    recipes: Mapping[str, Recipe]
    data: str
    out: Path
    epochs: int | None
    budget: float | None
    seed: int
    precision: Precision
    device: torch.device
    readers: int = 0

    def train(self, say: Callable[[str], None]) -> dict[str, list[Epoch]]:
        """What every epoch of every net came to. Runs that are in ``out`` are gone on with.

        Raises:
            ExperimentError: a run in ``out`` is another one.
            DataError, OSError, FloatingPointError, Interrupted: see :func:`runner.train`.
        """
        data = open_data(self.data, next(iter(self.recipes.values())), self.seed, self.device, self.readers)
        runs = {
            entry.label: Run(
                self.recipes[entry.label],
                self.data,
                self.seed,
                entry.shortcut,
                precision=self.precision,
            )
            for entry in self.entries
        }
        epochs = self.epochs or self._begun() or self._within_budget(runs, data, say)
        if epochs is not None:
            runs = {
                label: dataclasses.replace(run, recipe=_of_epochs(run.recipe, epochs, data))
                for label, run in runs.items()
            }
        curves: dict[str, list[Epoch]] = {}
        for label, run in runs.items():
            curves[label] = self._run(label, run, data, say)
            write_curves(self.out / CURVES, curves)
        return curves

    def _begun(self) -> int | None:
        """Epochs of the runs that are in ``out`` already."""
        for entry in self.entries:
            path = runner.resumable(self.out / entry.label)
            if path is not None:
                return Run.from_state_dict(checkpoint.load(path)["run"]).recipe.epochs
        return None

    def _within_budget(self, runs: Mapping[str, Run], data: Data, say: Callable[[str], None]) -> int | None:
        if self.budget is None:
            return None
        speeds = {label: images_per_second(run, data, self.device) for label, run in runs.items()}
        for label, (training, testing) in speeds.items():
            say(f"{label}: {training:,.0f} img/s in training, {testing:,.0f} in testing")
        tested = len(data.test) + (0 if data.validation is None else len(data.validation))
        epoch = sum(len(data.train) / training + tested / testing for training, testing in speeds.values())
        epochs = max(1, int(self.budget / epoch))
        say(f"{epochs} epochs of all in {self.budget / 60:g} minutes")
        return epochs

    def _run(self, label: str, run: Run, data: Data, say: Callable[[str], None]) -> list[Epoch]:
        folder = self.out / label
        path, state = runner.resumable(folder), None
        if path is not None:
            state = checkpoint.load(path)
            if Run.from_state_dict(state["run"]) != run:
                raise ExperimentError(f"{folder} has a run of other settings: choose another --out")
        history = [] if state is None else [Epoch(**epoch) for epoch in state["history"]]
        for epoch in history:
            say(f"{label:<12}{epoch}  (from {path})")
        for epoch in runner.train(run, data, runner.Settings(self.device, folder), state=state):
            history.append(epoch)
            say(f"{label:<12}{epoch}")
        return history


class ExperimentError(ValueError):
    """An experiment that can't be run like this; one line."""


def _of_epochs(whole: Recipe, epochs: int, data: Data) -> Recipe:
    return whole.shortened(epochs=epochs, steps=max(1, len(data.train) // whole.batch))


def images_per_second(run: Run, data: Data, device: torch.device) -> tuple[float, float]:
    """Of a net in training and in testing, from a few steps."""
    trainer = Trainer(run, data, device)
    start = time.perf_counter()
    for step, _ in enumerate(trainer, 1):
        if step == WARMUP:
            start = time.perf_counter()
        if step == WARMUP + PROBED:
            break
    training = PROBED * run.recipe.batch / (time.perf_counter() - start)
    with torch.inference_mode():
        x, _ = next(iter(data.test.batches(run.recipe.batch, 0, 1)))
        net = trainer.model.eval()
        net(x)
        start = time.perf_counter()
        net(x)
    return training, len(x) / (time.perf_counter() - start)


def write_curves(path: Path, curves: Curves) -> None:
    """A row for each epoch of each net."""
    names = [field.name for field in dataclasses.fields(Epoch)]
    with files.atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["net", *names])
        for label, history in curves.items():
            writer.writerows([label, *(getattr(epoch, name) for name in names)] for epoch in history)


def table(curves: Curves, reported: Mapping[str, Reported], note: str) -> str:
    """Errors at the end beside the paper's.

    Args:
        curves: of the nets.
        reported: the paper's by the label of a net.
        note: under what conditions the paper's are.
    """
    rows = [("net", "epochs", "training error", "test error", "the paper's", "")]
    for label, history in curves.items():
        last, theirs = history[-1], reported.get(label)
        rows.append(
            (
                label,
                str(last.number),
                f"{last.train_error:.2%}",
                f"{last.test_error:.2%}",
                f"{theirs.error:.2f}%" if theirs else "-",
                theirs.source if theirs else "",
            )
        )
    return "\n".join([*(line.rstrip() for line in report.aligned(rows)), note])


def plot(path: Path, panels: Mapping[str, Curves], title: str) -> None:
    """Errors over the iterations, a panel for each group: dashed in training, solid on the test images.

    Args:
        path: the PNG.
        panels: by their titles.
        title: of the whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        for number, (label, history) in enumerate(curves.items()):
            iterations = [epoch.iteration for epoch in history]
            colour = f"C{number}"
            train, test = (
                [100 * getattr(epoch, which) for epoch in history] for which in ("train_error", "test_error")
            )
            axis.plot(iterations, train, "--", color=colour, linewidth=1)
            axis.plot(iterations, test, color=colour, linewidth=2, label=label)
        axis.set_title(name)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("error, % (dashed: training)")
    figure.suptitle(title)
    with files.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
