"""Recipes: the paper's figures, and what can't be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fusedres.models import build
from fusedres.training import recipe
from fusedres.training.recipe import RecipeError

MINIMAL = (
    "{description: d, model: resnet20, batch: 8, epochs: 1, optimizer: {lr: 1e-1}, schedule: {kind: cosine}"
)


def written(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_loads(name):
    found = recipe.load(name)
    assert found.model in build.NAMES
    assert recipe.from_dict(dataclasses.asdict(found)) == found


def test_the_papers_recipe_for_cifar():
    """He et al. 2015, section 4.2."""
    found = recipe.load("cifar-paper")
    assert (found.batch, found.iterations, found.validation) == (128, 64_000, 5_000)
    optimizer, schedule, augmentation = found.optimizer, found.schedule, found.augmentation
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    assert optimizer.decay_norms and not optimizer.nesterov
    assert (schedule.kind, schedule.at, schedule.factor) == ("steps", (32_000, 48_000), 0.1)
    assert (augmentation.pad, augmentation.crop, augmentation.flip) == (4, 32, True)
    assert augmentation.mean == "per_pixel"
    assert (found.label_smoothing, found.ema) == (0, None)


def test_the_papers_recipe_for_110_layers():
    found, other = recipe.load("cifar110-warmup"), recipe.load("cifar-paper")
    schedule = found.schedule
    assert found.model == "resnet110"
    assert (found.optimizer.lr * schedule.warm_factor, schedule.warm_until) == (pytest.approx(0.01), 0.8)
    assert dataclasses.replace(schedule, warm_until=None) == other.schedule
    assert found.augmentation == other.augmentation


def test_the_papers_recipe_for_imagenet():
    """He et al. 2015, section 3.4."""
    found = recipe.load("imagenet-paper")
    assert (found.batch, found.iterations) == (256, 600_000)
    assert (found.optimizer.lr, found.optimizer.momentum, found.optimizer.weight_decay) == (0.1, 0.9, 1e-4)
    assert (found.schedule.kind, found.schedule.factor) == ("plateau", 0.1)
    augmentation = found.augmentation
    assert (augmentation.shorter, augmentation.crop, augmentation.flip) == ((256, 480), 224, True)
    assert augmentation.mean == "per_pixel" and augmentation.colour == 0.1


def test_a_file_and_changes(tmp_path):
    path = written(tmp_path, MINIMAL + "}")
    assert recipe.load(path).optimizer.lr == 0.1
    found = recipe.load(path, {"optimizer.weight_decay": "5e-4", "augmentation.flip": True, "batch": 16})
    assert (found.optimizer.weight_decay, found.augmentation.flip, found.batch) == (5e-4, True, 16)
    # what was not named keeps its default
    assert found.optimizer.momentum == 0.9 and found.augmentation.crop is None


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (", batchsize: 8}", r"unknown key batchsize, did you mean batch\?"),
        (", augmentation: {flop: true}}", r"unknown key augmentation.flop, did you mean augmentation.flip\?"),
        (", frobnicate: 8}", "unknown key frobnicate; there are description"),
        (", validation: many}", "validation must be a whole number, got 'many'"),
        (", validation: -1}", "validation must not be negative"),
        (", ema: true}", "ema must be a number, got True"),
        (", ema: 1}", r"ema must be in \(0, 1\)"),
        (", iterations: 4}", "exactly one of iterations and epochs must be given"),
        (", augmentation: 3}", "augmentation must be a mapping, got 3"),
        (", augmentation: {pad: 4}}", "augmentation.crop is needed with pad"),
        (
            ", augmentation: {crop: 32, shorter: [20, 40]}}",
            "augmentation.shorter must be a range of at least",
        ),
        (
            ", augmentation: {crop: 32, shorter: [40]}}",
            r"augmentation.shorter must be a list of 2, got \[40\]",
        ),
        (", augmentation: {crop: 32, area: [0, 1]}}", r"augmentation.area must be a range in \(0, 1\]"),
        (
            ", augmentation: {crop: 8, pad: 1, area: [0.5, 1]}}",
            "only one of augmentation.pad, shorter and area",
        ),
        (
            ", augmentation: {crop: 8, test_crop: 9, test_shorter: 8}}",
            "test_shorter must be at least test_crop",
        ),
        (", augmentation: {mean: per_image}}", "augmentation.mean must be one of per_pixel, .*'per_image'"),
        ("", "no YAML"),
    ],
)
def test_what_can_not_be_right(tmp_path, rest, message):
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.load(written(tmp_path, MINIMAL + rest))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule.kind": "linear"}, "schedule.kind must be one of steps, plateau, cosine, got 'linear'"),
        ({"schedule.at": [5]}, "schedule.at is for kind: steps"),
        ({"schedule": {"kind": "steps", "at": [5, 3]}}, "schedule.at must be rising"),
        ({"schedule": {"kind": "steps", "at": ["soon"]}}, "schedule.at must be a whole number, got 'soon'"),
        ({"optimizer.lr": 0}, "optimizer.lr must be above 0"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr must be above 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"epochs": 0}, "at least 1"),
        ({"batch.size": 1}, "batch has no size"),
        ({"optimizer": {}}, "optimizer.lr is missing"),
    ],
)
def test_changes_that_can_not_be_right(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(written(tmp_path, MINIMAL + "}"), changes)


def test_no_such_recipe(tmp_path):
    with pytest.raises(RecipeError, match="must be one of cifar-paper, .* or a .yaml, got 'cifar'"):
        recipe.load("cifar")
    with pytest.raises(RecipeError, match="can't read recipe"):
        recipe.load(str(tmp_path / "none.yaml"))
    with pytest.raises(RecipeError, match="must be a mapping, got list"):
        recipe.load(written(tmp_path, "[1]"))


def test_shortened():
    found = recipe.load("cifar-paper").shortened(epochs=12, steps=400)
    assert (found.iterations, found.epochs, found.length(400)) == (None, 12, 4800)
    assert found.schedule.at == (2400, 3600)
    short = recipe.load("cifar-short")
    assert short.shortened(epochs=30, steps=400).schedule.warmup == 2 * short.schedule.warmup
