"""Recipes by purpose."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import kvsieve
from kvsieve.bench.spec import parse_method
from kvsieve.cli import app
from kvsieve.errors import RecipeError, UnknownMethod
from kvsieve.presets import PRESETS
from kvsieve.registry import find, methods


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_method_with_its_options(name: str) -> None:
    preset = PRESETS[name]
    recipe = kvsieve.recipe(name, budget=4096)
    wanted = kvsieve.recipe(preset.method, budget=4096, **preset.options)
    assert recipe == wanted and recipe.method in methods() and name not in methods()
    # What is written down needs no preset to be read.
    assert recipe.to_dict()["method"] == preset.method
    assert kvsieve.Recipe.from_dict(recipe.to_dict()) == recipe
    assert find(name) is find(preset.method)


def test_given_options_come_first() -> None:
    name = next(n for n, preset in PRESETS.items() if "history" in preset.options)
    assert kvsieve.recipe(name, budget=64, history=0.5).options["history"] == 0.5
    with pytest.raises(RecipeError, match="no option 'nonsense'"):
        kvsieve.recipe(name, budget=64, nonsense=1)


def test_unknown_purposes_name_the_near_ones() -> None:
    with pytest.raises(UnknownMethod, match="Did you mean 'auto:reasoning'"):
        kvsieve.recipe("auto:resoning", budget=64)


def test_benchmarks_take_presets() -> None:
    assert parse_method("auto:reasoning") == ("auto:reasoning", {})
    assert parse_method("auto:reasoning:interval=8") == ("auto:reasoning", {"interval": 8})


def test_the_command_line_takes_presets() -> None:
    for arguments in (
        ["show", "auto:reasoning"],
        ["compare", "--methods", "auto:reasoning,full", "--budget", "50%", "--sample", "retrieval"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(app, ["methods"]).output
    assert all(name in listed for name in PRESETS)
