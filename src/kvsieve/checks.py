"""What can't be a recipe, whatever the model is."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from kvsieve.compressors import Evict
from kvsieve.errors import RecipeError, UnsupportedLayout, choices
from kvsieve.interfaces import Scope, Signal

if TYPE_CHECKING:
    from kvsieve.compose import Recipe


def check(recipe: Recipe) -> None:
    """Check that the parts of a recipe fit one another.

    Raises:
        UnsupportedLayout: an unknown layout.
        RecipeError: says which parts don't, and what to do.
    """
    if recipe.layout not in ("dense", "ragged"):
        possible = ("dense", "ragged")
        raise UnsupportedLayout(
            f"Unknown layout {recipe.layout!r}. {choices(str(recipe.layout), possible)}"
        )
    if recipe.sinks < 0 or recipe.recent < 0:
        raise RecipeError("sinks and recent count protected tokens: they can't be negative.")
    _check_spans("protect", recipe.protect)
    _check_spans("fair", recipe.fair)
    if recipe.fair:
        _check_fair(recipe)
    if recipe.acts_before:
        _check_moment(recipe)
    _check_ratio(recipe)
    if recipe.rerotate:
        _check_rerotation(recipe)


def _check_spans(name: str, spans: tuple[tuple[int, int], ...]) -> None:
    for span in spans:
        if len(span) != 2 or not 0 <= span[0] < span[1]:
            raise RecipeError(
                f"{name} has {span!r}: give spans (start, end) of token indices, start < end."
            )


def _check_fair(recipe: Recipe) -> None:
    ordered = sorted(recipe.fair)
    if any(end > start for (_, end), (start, _) in pairwise(ordered)):
        raise RecipeError(f"fair has spans that overlap: {ordered}.")
    if not isinstance(recipe.compressor, Evict):
        raise RecipeError(
            f"{recipe.method!r} decides by more than each slot's own score which slots stay, so "
            "that spans can't be given equal shares (option fair). Use protect, or a method "
            "that keeps each head's best slots."
        )


def _check_moment(recipe: Recipe) -> None:
    waits = recipe.scope is Scope.MODEL
    if waits or Signal.REPLAY in recipe.needs:
        why = "decides over all layers together" if waits else "repeats the prompt first"
        raise RecipeError(
            f"Schedule {str(recipe.schedule)!r} cuts a layer before it attends, but "
            f"{recipe.method!r} {why}. Use 'each-step', or a method of scope 'head' or 'layer'."
        )


def _check_rerotation(recipe: Recipe) -> None:
    made = [column.name for column in recipe.columns if column.of_key]
    if recipe.summarise is not None or made:
        what = f"the {made[0]} of each key" if made else "a summary of keys that were dropped"
        raise RecipeError(
            f"{recipe.method!r} remembers {what} as they stood: moving the kept ones would make it "
            "wrong. Leave rerotate out, or use another method."
        )


def _check_ratio(recipe: Recipe) -> None:
    if not 0 <= recipe.ratio < 1:
        raise RecipeError(f"ratio={recipe.ratio}: a share of the tokens seen, from 0 to below 1.")
    if recipe.ratio and recipe.budget is not None and recipe.budget.kind != "slots":
        raise RecipeError(
            f"ratio={recipe.ratio} lets a budget in slots grow, and {recipe.budget} is none. Give "
            "the budget as a number of slots, or leave ratio out."
        )
