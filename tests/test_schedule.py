"""Learning rates, against PyTorch's schedulers and the paper's words."""

from __future__ import annotations

import pytest
import torch

from fusedres.training import recipe
from fusedres.training.schedule import Schedule


def factors(of: recipe.Schedule, length: int) -> list[float]:
    schedule = Schedule(of, length)
    found = []
    for _ in range(length):
        found.append(schedule.factor)
        schedule.after_iteration()
    return found


def torch_factors(make, length: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(length):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_steps():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5, 8], 0.1), 12)
    assert factors(recipe.Schedule("steps", at=(5, 8)), 12) == pytest.approx(expected)


def test_cosine():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30), 30)
    assert factors(recipe.Schedule("cosine"), 30) == pytest.approx(expected)


def test_warmup_rises_to_one():
    found = factors(recipe.Schedule("steps", warmup=4), 8)
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_plateau():
    """PyTorch's patience is of epochs that are let pass, ours of all that were no better."""
    errors = [0.9, 0.8, 0.8, 0.8, 0.8, 0.7, 0.75, 0.72, 0.71, 0.6, 0.6, 0.6, 0.6]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, threshold_mode="abs")
    schedule = Schedule(recipe.Schedule("plateau", patience=3), 1000)
    seen = []
    for error in errors:
        theirs.step(error)
        schedule.after_epoch(error)
        seen.append(schedule.factor)
        assert schedule.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(seen)) == 4


@pytest.mark.parametrize("passed_at", [4, 17])
def test_small_rate_until_the_training_error(passed_at):
    """Section 4.2: 0.01 until the training error is below 80%, whenever that is; then back to 0.1."""
    schedule = Schedule(recipe.Schedule("steps", warm_until=0.8, warm_window=4), 100)
    found = []
    for iteration in range(30):
        found.append(schedule.factor)
        assert schedule.watches_errors == (schedule.factor < 1)
        schedule.after_iteration(90 if iteration < passed_at else 79, 100)
    # under 80% on average of the last four
    first = found.index(1.0)
    assert first == passed_at + 4
    assert found[:first] == [0.1] * first and set(found[first:]) == {1.0}


def test_exactly_80_percent_is_not_under():
    schedule = Schedule(recipe.Schedule("steps", warm_until=0.8, warm_window=2), 100)
    for _ in range(5):
        schedule.after_iteration(80, 100)
    assert schedule.factor == 0.1


def test_goes_on_from_its_state():
    of = recipe.Schedule("plateau", patience=2, warm_until=0.5, warm_window=3)
    one, two = Schedule(of, 50), Schedule(of, 50)
    for iteration in range(7):
        one.after_iteration(9 - iteration, 10)
    one.after_epoch(0.3)
    one.after_epoch(0.3)
    two.load_state_dict(one.state_dict())
    for iteration in range(7):
        assert two.factor == one.factor
        for schedule in (one, two):
            schedule.after_iteration(9 - iteration, 10)
            schedule.after_epoch(0.3)
