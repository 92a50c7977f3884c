"""Recipes as the command line changes them."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from fusedres.cli.errors import USAGE, CommandError
from fusedres.training import recipe
from fusedres.training.recipe import Recipe, RecipeError


def add_set(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="change the recipe, as optimizer.weight_decay=5e-4; may be given again",
    )


def load(name: str, settings: list[str] | None, changes: dict[str, Any]) -> Recipe:
    """A recipe as ``--set`` and other options change it.

    Args:
        name: see :func:`fusedres.training.recipe.load`.
        settings: ``--set``'s.
        changes: likewise, by dotted names; where None nothing is changed.
    """
    found: dict[str, Any] = {}
    for change in settings or ():
        key, equals, value = change.partition("=")
        if not equals:
            raise CommandError(f"--set must be KEY=VALUE, got {change!r}", USAGE)
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CommandError(f"--set {key}: {' '.join(str(error).split())}", USAGE) from error
    found |= {key: value for key, value in changes.items() if value is not None}
    try:
        return recipe.load(name, found)
    except RecipeError as error:
        raise CommandError(str(error), USAGE) from error
