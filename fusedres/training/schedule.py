"""The learning rate over the iterations of a run."""

from __future__ import annotations

import math
from typing import Any

from fusedres.training import recipe

THRESHOLD = 1e-4  # an error has to fall by this, absolutely, to count as better


class Schedule:
    """The factors that :class:`recipe.Schedule` describes.

    Args:
        of: the description.
        length: iterations of the run.
    """

    def __init__(self, of: recipe.Schedule, length: int) -> None:
        self.of, self.length = of, length
        self.iteration = 0
        # of a plateau
        self.best, self.worse, self.drops = math.inf, 0, 0
        # of the phase until an error: what was wrong in the last iterations, and of how many
        self.warm = of.warm_until is not None
        self.window: list[tuple[int, int]] = []

    @property
    def factor(self) -> float:
        """Of the learning rate, in the iteration to come."""
        of, iteration = self.of, self.iteration
        factor = min(1.0, (iteration + 1) / of.warmup) if of.warmup else 1.0
        if self.warm:
            factor *= of.warm_factor
        if of.kind == "steps":
            return factor * of.factor ** sum(at <= iteration for at in of.at)
        if of.kind == "plateau":
            return factor * of.factor**self.drops
        return factor * (1 + math.cos(math.pi * iteration / self.length)) / 2

    @property
    def watches_errors(self) -> bool:
        """Whether ``after_iteration`` has to be told what was wrong."""
        return self.warm

    def after_iteration(self, wrong: int = 0, images: int = 0) -> None:
        """An iteration is done, in which ``wrong`` of the images were classified wrong."""
        self.iteration += 1
        if self.warm and self.of.warm_until is not None:
            self.window = [*self.window, (wrong, images)][-self.of.warm_window :]
            all_wrong, all_images = map(sum, zip(*self.window, strict=True))
            full = len(self.window) == self.of.warm_window
            self.warm = not (full and all_wrong < self.of.warm_until * all_images)

    def after_epoch(self, error: float) -> None:
        """An epoch is done, with this error on images that were held out."""
        if error < self.best - THRESHOLD:
            self.best, self.worse = error, 0
            return
        self.worse += 1
        if self.worse >= self.of.patience:
            self.worse, self.drops = 0, self.drops + 1

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("of", "length")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
