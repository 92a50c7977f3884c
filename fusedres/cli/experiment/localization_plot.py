"""The picture of a localization: errors as they fall, and objects with the boxes that were found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fusedres.cli.experiment.canvases import Canvases
from fusedres.detection import Prediction
from fusedres.training import files

if TYPE_CHECKING:
    from fusedres.cli.experiment.localizing import Record

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CURVES = {
    "class_error": ("best guess is of another class", "#e45756"),
    "box_error": ("box of the right class overlaps by < 0.5", "#4c78a8"),
    "localization_error": ("either (localization error)", "#5b6b86"),
}
TRUE, FOUND = "#35d07f", "#ff9f1c"
ROWS, COLUMNS = 2, 4


def write(records: Sequence[Record], test: Canvases, prediction: Prediction, path: Path) -> None:
    """Draw a PNG.

    Args:
        records: of the training.
        test: canvases, of which the first are drawn.
        prediction: the best guesses for them first.
        path: of the PNG.
    """
    figure: Any = Figure(figsize=(12, 4.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    _curves(left.subplots(), records)
    for n, axes in enumerate(right.subplots(ROWS, COLUMNS).flat):
        axes.axis("off")
        if n < len(test.labels):
            _canvas(axes, test, prediction, n)
    right.suptitle("test images: the object (solid) and the best guess (dashed)", fontsize=10)
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _curves(axes: Any, records: Sequence[Record]) -> None:
    minutes = [record.seconds / 60 for record in records]
    for name, (label, colour) in CURVES.items():
        errors = [100 * getattr(record, name) for record in records]
        axes.plot(minutes, errors, color=colour, label=f"{label}: {errors[-1]:.1f}%", marker=".")
    axes.set_xlabel("minutes")
    axes.set_ylabel("% of test images")
    axes.set_ylim(0, 100)
    axes.grid(color="#e6e8ec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Localization on pasted images", loc="left", fontweight="bold")


def _canvas(axes: Any, test: Canvases, prediction: Prediction, n: int) -> None:
    axes.imshow(test.pixels[n].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    for box, colour, style in ((test.boxes[n], TRUE, "-"), (prediction.boxes[n, 0], FOUND, "--")):
        x1, y1, x2, y2 = (float(v) - 0.5 for v in box)  # imshow's pixels have their middles at whole numbers
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=style, linewidth=2)
        )
    found, true = int(prediction.classes[n, 0]), int(test.labels[n])
    names = (
        CIFAR10
        if prediction.classes.shape[1] == len(CIFAR10)
        else tuple(map(str, range(max(found, true) + 1)))
    )
    title = names[found] if found == true else f"{names[found]} (is {names[true]})"
    axes.set_title(title, fontsize=8, color="black" if found == true else "#c0392b")
