"""Methods and budgets as they are asked for on the command line, for any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from kvsieve.bench.quality.plan import Asked
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError


def recipe_of(asked: Asked) -> Recipe:
    """Build a recipe for prompts that are read as they come.

    Raises:
        RecipeError: the method can't be used at that budget, or lacks statistics of the model.
    """
    built = Recipe.from_dict(asked.plain("", 0))
    built.check_statistics()
    return built


def adapted(asked: Sequence[Asked], change: Callable[[Recipe], Recipe]) -> list[Asked]:
    """Change options as ``change`` changes recipes; what can't be built stays, to be refused."""
    return [_adapted(one, change) for one in asked]


def _adapted(asked: Asked, change: Callable[[Recipe], Recipe]) -> Asked:
    try:
        built = change(recipe_of(asked))
    except RecipeError:
        return asked
    return dataclasses.replace(asked, options=dict(built.options))
