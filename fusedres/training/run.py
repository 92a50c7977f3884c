"""A run: what is trained how on what, as its checkpoint keeps it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fusedres.models import build
from fusedres.models.resnet import Network, Shortcut
from fusedres.nn import Variant, Zeros
from fusedres.training import recipe
from fusedres.training.data import Loader
from fusedres.training.recipe import Recipe

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Net:
    """A network by name; arguments as of :func:`fusedres.models.build.build`."""

    name: str
    num_classes: int
    shortcut: Shortcut | None = None
    zeros: Zeros = "end"
    variant: Variant = "v1.5"

    def build(self) -> Network:
        return build.build(**dataclasses.asdict(self))


@dataclass(frozen=True)
class Run:
    """Everything that decides what comes out of a run on a given machine.

    Args:
        recipe: how the net is trained.
        data: on what; see :func:`fusedres.training.data.open_data`.
        seed: of the weights, the splits, the order and the augmentation.
        shortcut: None for the net's own.
        variant: of a net of bottlenecks.
        precision: "bf16" and "fp16" train under autocast, "fp16" with a scaled loss.
        accumulate: parts that a process takes its share of a batch in, one after the other.
        recompute: whether blocks keep their inputs alone and are computed again in the backward.
        sync_bn: whether batch norms take their statistics over all processes.
        loader: what reads image files; the loaders' pixels differ by their rounding.
    """

    recipe: Recipe
    data: str
    seed: int = 0
    shortcut: Shortcut | None = None
    variant: Variant = "v1.5"
    precision: Precision = "fp32"
    accumulate: int = 1
    recompute: bool = False
    sync_bn: bool = False
    loader: Loader = "torchvision"

    def net(self, classes: int) -> Net:
        return Net(self.recipe.model, classes, self.shortcut, variant=self.variant)

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Run:
        """Raises RecipeError, or TypeError for keys that no run has."""
        return cls(**{**state, "recipe": recipe.from_dict(state["recipe"])})
