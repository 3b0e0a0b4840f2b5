"""The tree of errors is as drawn, and names near ones."""

from __future__ import annotations

import inspect

import pytest

from kvsieve import KVSieveError, errors


def classes() -> list[type[Exception]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return [x for _, x in found if issubclass(x, Exception)]


def test_all_errors_are_one_tree_and_drawn() -> None:
    assert len(classes()) >= 9
    for error in classes():
        assert issubclass(error, KVSieveError)
        assert error.__name__ in (errors.__doc__ or "")
        assert error.__doc__


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        (errors.RecipeError, (KVSieveError, ValueError)),
        (errors.UnknownMethod, (errors.RecipeError,)),
        (errors.UnsupportedSignal, (errors.RecipeError,)),
        (errors.UnsupportedLayout, (errors.RecipeError,)),
        (errors.BudgetError, (errors.RecipeError,)),
        (errors.EngineError, (KVSieveError, RuntimeError)),
        (errors.ConversionError, (KVSieveError, RuntimeError)),
        (errors.ReferenceModelError, (KVSieveError, ValueError)),
    ],
)
def test_parents(error: type[Exception], parents: tuple[type, ...]) -> None:
    assert error.__bases__ == parents


def test_choices() -> None:
    text = errors.choices("snapvk", ["tova", "snapkv", "h2o"])
    assert text == "Did you mean 'snapkv'? Possible: h2o, snapkv, tova."
    assert errors.choices("zzz", ["b", "a"]) == "Possible: a, b."
