"""How a net is trained, as data: a dataclass, and small YAML files of it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fusedres.training.normalise import Mean

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that can't be read, or that can't be right; one line."""


@dataclass(frozen=True)
class Optimizer:
    """Stochastic gradient descent.

    Args:
        lr: learning rate, that the schedule multiplies.
        momentum: of the gradient.
        nesterov: Nesterov's momentum.
        weight_decay: of the weights.
        decay_norms: whether batch norms and biases decay, too, as the paper's do.
    """

    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the iterations, as factors of ``Optimizer.lr``.

    Args:
        kind: "steps": times ``factor`` at each iteration of ``at``; "plateau": times ``factor`` when the
            error on images held out (or else on the test images) has not fallen for ``patience`` epochs;
            "cosine": half a cosine from 1 to 0.
        at: iterations.
        factor: of a step or a plateau.
        patience: epochs.
        warmup: iterations in which the rate rises linearly from 0.
        warm_factor: times this until the training error is below ``warm_until``.
        warm_until: error, from 0 to 1, over the last ``warm_window`` iterations; None for no such phase.
        warm_window: iterations.
    """

    kind: Literal["steps", "plateau", "cosine"]
    at: tuple[int, ...] = ()
    factor: float = 0.1
    patience: int = 5
    warmup: int = 0
    warm_factor: float = 0.1
    warm_until: float | None = None
    warm_window: int = 100


@dataclass(frozen=True)
class Augmentation:
    """What training images go through; test images are only resized, cropped in the centre and normalised.

    Args:
        crop: px, side of what the net reads in training; None for images as they are.
        pad: px on every side before the random crop: zeros behind the normalisation for images in memory,
            black for image files.
        shorter: px, range of the random shorter side that an image is resized to before the random crop
            (He et al. 2015, section 3.4).
        area: range of the random share of the image that is cropped and resized (Szegedy et al. 2015).
        test_crop: px, side of what the net reads in testing; None for crop.
        test_shorter: px, shorter side of a test image before its crop in the centre; None for test_crop.
        flip: whether half of the images are mirrored.
        colour: standard deviation of the colour augmentation (Krizhevsky et al. 2012, section 4.1).
        mean: what is subtracted, and divided by: see :func:`fusedres.training.normalise.measure`.
    """

    crop: int | None = None
    pad: int = 0
    shorter: tuple[int, int] | None = None
    area: tuple[float, float] | None = None
    test_crop: int | None = None
    test_shorter: int | None = None
    flip: bool = False
    colour: float = 0.0
    mean: Mean = "per_channel"


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    Args:
        description: one line, with the source.
        model: name of the net; one of ``models.build.NAMES``.
        batch: images in a step, over all processes.
        iterations: steps in all; this or ``epochs``.
        epochs: passes over the training images.
        optimizer: see :class:`Optimizer`.
        schedule: see :class:`Schedule`.
        augmentation: see :class:`Augmentation`.
        validation: how many training images are held out.
        label_smoothing: share of the target that goes to all classes.
        ema: decay of the moving average of the weights, that is then tested and kept; None for none.
    """

    description: str
    model: str
    batch: int
    optimizer: Optimizer
    schedule: Schedule
    augmentation: Augmentation = field(default_factory=Augmentation)
    iterations: int | None = None
    epochs: int | None = None
    validation: int = 0
    label_smoothing: float = 0.0
    ema: float | None = None

    def __post_init__(self) -> None:
        schedule, augmentation = self.schedule, self.augmentation
        crop = augmentation.crop
        wrong = {
            "exactly one of iterations and epochs must be given": (self.iterations is None)
            == (self.epochs is None),
            "iterations and epochs must be at least 1": (self.iterations or self.epochs or 0) < 1,
            "batch must be at least 1": self.batch < 1,
            "validation must not be negative": self.validation < 0,
            "optimizer.lr must be above 0": not 0 < self.optimizer.lr < math.inf,
            "optimizer.momentum must be in [0, 1)": not 0 <= self.optimizer.momentum < 1,
            "optimizer.weight_decay must not be negative": not 0 <= self.optimizer.weight_decay < math.inf,
            "schedule.at must be rising iterations": list(schedule.at)
            != sorted({at for at in schedule.at if at > 0}),
            "schedule.at is for kind: steps": bool(schedule.at) and schedule.kind != "steps",
            "schedule.factor must be in (0, 1]": not 0 < schedule.factor <= 1,
            "schedule.patience must be at least 1": schedule.patience < 1,
            "schedule.warmup must not be negative": schedule.warmup < 0,
            "schedule.warm_factor must be above 0": not 0 < schedule.warm_factor < math.inf,
            "schedule.warm_window must be at least 1": schedule.warm_window < 1,
            "label_smoothing must be in [0, 1)": not 0 <= self.label_smoothing < 1,
            "ema must be in (0, 1)": self.ema is not None and not 0 < self.ema < 1,
            "augmentation.crop must be at least 1": crop is not None and crop < 1,
            "augmentation.pad must not be negative": augmentation.pad < 0,
            "augmentation.colour must not be negative": not 0 <= augmentation.colour < math.inf,
            "only one of augmentation.pad, shorter and area can be given": sum(
                map(bool, (augmentation.pad, augmentation.shorter, augmentation.area))
            )
            > 1,
            "augmentation.crop is needed with pad, shorter, area, test_crop or test_shorter": crop is None
            and augmentation
            != Augmentation(flip=augmentation.flip, colour=augmentation.colour, mean=augmentation.mean),
            "augmentation.shorter must be a range of at least crop": augmentation.shorter is not None
            and not (crop or 0) <= augmentation.shorter[0] <= augmentation.shorter[1],
            "augmentation.test_crop must be at least 1": (augmentation.test_crop or 1) < 1,
            "augmentation.test_shorter must be at least test_crop": augmentation.test_shorter is not None
            and augmentation.test_shorter < (augmentation.test_crop or crop or 0),
            "augmentation.area must be a range in (0, 1]": augmentation.area is not None
            and not 0 < augmentation.area[0] <= augmentation.area[1] <= 1,
        }
        for requirement, broken in wrong.items():
            if broken:
                raise RecipeError(requirement)

    def length(self, steps: int) -> int:
        """Iterations in all, where an epoch has ``steps``."""
        return self.iterations or (self.epochs or 0) * steps

    def shortened(self, *, iterations: int | None = None, epochs: int | None = None, steps: int) -> Recipe:
        """The recipe with another length, and its schedule stretched or shrunk with it.

        Args:
            iterations: this or ``epochs``.
            epochs: likewise.
            steps: iterations of an epoch.
        """
        length = iterations or (epochs or 0) * steps
        scale = length / self.length(steps)
        schedule = dataclasses.replace(
            self.schedule,
            at=tuple(sorted({max(1, round(at * scale)) for at in self.schedule.at})),
            warmup=round(self.schedule.warmup * scale),
        )
        return dataclasses.replace(self, iterations=iterations, epochs=epochs, schedule=schedule)


def names() -> list[str]:
    """The recipes that come with the package."""
    folder = importlib.resources.files(__package__) / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the package, or one of a file.

    Args:
        name: one of ``names()``, or the path of a .yaml.
        changes: values by their dotted names, as {"optimizer.lr": 0.05}, that replace the file's.

    Raises:
        RecipeError: there is no such recipe, or it can't be right; names the key.
    """
    if name in names():
        text = (importlib.resources.files(__package__) / "recipes" / f"{name}.yaml").read_text()
    elif Path(name).suffix in (".yaml", ".yml"):
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"can't read recipe {name}: {error}") from error
    else:
        raise RecipeError(f"the recipe must be one of {', '.join(names())} or a .yaml, got {name!r}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {name} must be a mapping, got {type(content).__name__}")
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise RecipeError(f"recipe {name}: {parent} has no {last}")
        place[last] = value
    try:
        return from_dict(content)
    except RecipeError as error:
        raise RecipeError(f"recipe {name}: {error}") from error


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """The recipe that ``dataclasses.asdict`` or a YAML file gave as a mapping.

    Raises:
        RecipeError: an unknown or missing key, or a value that can't be.
    """
    return _parse(Recipe, content, "")


def _parse(kind: type[T], content: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f", did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(hints)}"
            raise RecipeError(f"unknown key {prefix}{key}{hint}")
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        if (
            entry.name not in content
            and entry.default is dataclasses.MISSING
            and entry.default_factory is dataclasses.MISSING
        ):
            raise RecipeError(f"{prefix}{entry.name} is missing")
    return kind(**{key: _value(hints[key], value, prefix + key) for key, value in content.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """``value`` as ``kind``, or a RecipeError that names it."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{name} must be a mapping, got {value!r}")
        return _parse(kind, value, f"{name}.")  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # of something and None
        return None if value is None else _value(arguments[0], value, name)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{name} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        count = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, list | tuple) or count not in (None, len(value)):
            raise RecipeError(f"{name} must be a list{f' of {count}' if count else ''}, got {value!r}")
        return tuple(_value(arguments[0], entry, name) for entry in value)
    if kind is float:
        try:  # a string, too: YAML 1.1 takes 1e-4 for one
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
        raise RecipeError(f"{name} must be a number, got {value!r}")
    if type(value) is not kind:
        called = {int: "a whole number", bool: "true or false", str: "a string"}[kind]
        raise RecipeError(f"{name} must be {called}, got {value!r}")
    return value
