"""Recipes: how they are built, what is refused, and that they survive a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve import Recipe, registry
from kvsieve.errors import BudgetError, RecipeError, UnknownMethod, UnsupportedLayout
from kvsieve.interfaces import Scope, Signal

BUDGET = 4096


def build(name: str, **options: Any) -> Recipe:
    compresses = registry.find(name).build().compresses
    return kvsieve.recipe(name, **({"budget": BUDGET} if compresses else {}), **options)


@pytest.mark.parametrize("name", registry.methods())
def test_every_method_builds_and_reads_back(name: str) -> None:
    recipe = build(name)
    assert recipe.method == name
    again = Recipe.from_dict(recipe.to_dict())
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    if recipe.compresses:
        assert recipe.schedule is not None
        assert recipe.budget is not None and recipe.budget.value == BUDGET
        assert recipe.scope in Scope
        assert all(isinstance(signal, Signal) for signal in recipe.needs)
        assert (recipe.layout == "ragged") == recipe.uneven


@pytest.mark.parametrize("name", registry.methods())
def test_common_options_reach_every_method(name: str) -> None:
    recipe = build(name)
    if not recipe.compresses:
        return
    changed = build(name, schedule="after-prefill|every:7", protect=[(3, 9)], layout="ragged")
    assert str(changed.schedule) == "after-prefill|every:7"
    assert changed.protect == ((3, 9),)
    assert changed.layout == "ragged"
    assert Recipe.from_dict(changed.to_dict()) == changed


def test_a_wrapper_hands_an_option_that_both_know_to_the_scorer() -> None:
    """expected-attention leaves its sinks out of the statistics, too: protecting isn't enough."""
    alone = build("expected-attention", sinks=8)
    wrapped = build("criticalkv", scorer="expected-attention", sinks=8)
    assert wrapped.sinks == alone.sinks == 8
    assert wrapped.scorer == alone.scorer != build("expected-attention").scorer


def test_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'method = "adakv"\nscorer = "g-kv"\nbudget = "25%"\nwindow = 8\nprotect = [[0, 4]]\n'
    )
    wanted = kvsieve.recipe("adakv", scorer="g-kv", budget=0.25, window=8, protect=[(0, 4)])
    got = Recipe.from_toml(path)
    assert got.scorer == wanted.scorer and got.budget == wanted.budget
    assert got.protect == wanted.protect and got.allocator == wanted.allocator


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Can't read the recipe"),
        ("method = ", "Can't read the recipe"),
        ("budget = 5", "needs a 'method'"),
        ('method = "snap"\nbudget = 500', "Did you mean 'snapkv'"),
    ],
)
def test_toml_files_that_are_none(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(path)


def test_unknown_methods_have_near_matches() -> None:
    with pytest.raises(UnknownMethod, match=r"'snapvk'\. Did you mean 'snapkv'.*Possible: adakv"):
        kvsieve.recipe("snapvk", budget=100)


@pytest.mark.parametrize("name", registry.methods())
def test_unknown_options_are_refused_with_near_matches(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no option 'no_such_option'.*Possible:"):
        build(name, no_such_option=3)


def test_near_options() -> None:
    with pytest.raises(RecipeError, match=r"no option 'windw'\. Did you mean 'window'"):
        kvsieve.recipe("snapkv", budget=100, windw=3)
    with pytest.raises(RecipeError, match=r"no option 'windw'\. Did you mean 'window'"):
        kvsieve.recipe("adakv", budget=100, windw=3)


def test_budgets_are_asked_for_where_they_mean_something() -> None:
    with pytest.raises(BudgetError, match="'snapkv' needs a budget: slots"):
        kvsieve.recipe("snapkv")
    with pytest.raises(BudgetError, match="'full' removes nothing and takes no budget"):
        kvsieve.recipe("full", budget=100)
    with pytest.raises(BudgetError, match="above 0 and up to 1"):
        kvsieve.recipe("snapkv", budget=1.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"budget": 32}),
        ("snapkv", {"budget": 8, "window": 8}),
        ("streaming-llm", {"budget": 4}),
        ("knorm", {"budget": 10, "sinks": 4, "recent": 6}),
        ("knorm", {"budget": 10, "protect": [(0, 5), (7, 12)]}),
        ("h2o", {"budget": 10, "recent": 1.0}),
    ],
)
def test_budgets_that_protection_fills(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="leaves no room beside what is protected"):
        kvsieve.recipe(name, **options)
    kvsieve.recipe(name, **(options | {"budget": 60, "recent": 5}))


def test_room_is_checked_against_real_rows() -> None:
    recipe = kvsieve.recipe("knorm", budget=0.5, sinks=4, recent=4, protect=[(0, 6)])
    recipe.check_room(10, length=10)  # everything stays
    recipe.check_room(11, length=12)  # ten of twelve are protected: 0..5 and 8..11
    with pytest.raises(BudgetError):
        recipe.check_room(10, length=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": [(5, 5)]}, "start < end"),
        ({"protect": [(-1, 5)]}, "start < end"),
        ({"protect": [5]}, "list of spans"),
        ({"protect": [("a", "b")]}, "list of spans"),
        ({"sinks": -1}, "can't be negative"),
        ({"recent": -1}, "can't be negative"),
        ({"schedule": "sometimes"}, "Unknown schedule 'sometimes'"),
    ],
)
def test_impossible_common_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kvsieve.recipe("knorm", budget=100, **options)


def test_methods_that_choose_take_the_budget_as_a_cap() -> None:
    free = kvsieve.recipe("dbudgetkv")
    assert free.dynamic and free.budget == kvsieve.recipe("dbudgetkv", budget=1.0).budget
    assert Recipe.from_dict(free.to_dict()) == free
    assert not kvsieve.recipe("snapkv", budget=100).dynamic
    with pytest.raises(BudgetError, match="keeps 300 slots at least"):
        kvsieve.recipe("conf-kv", budget=200, least=300)
    shares = kvsieve.recipe("conf-kv", budget=0.5, least=30, recent=2)
    shares.check_room(30, length=60)
    with pytest.raises(BudgetError, match="keeps 30 slots at least"):
        shares.check_room(29, length=58)


@pytest.mark.parametrize(("name", "scope"), [("laprox", "model"), ("kvzip", "layer")])
def test_what_waits_for_the_model_cannot_act_before_attention(name: str, scope: str) -> None:
    with pytest.raises(RecipeError, match="before it attends"):
        kvsieve.recipe(name, budget=100, schedule="before-attend", scope=scope)


def test_a_token_that_has_not_attended_is_protected() -> None:
    plain = kvsieve.recipe("knorm", budget=100, schedule="each-step")
    early = kvsieve.recipe("knorm", budget=100, schedule="each-step|before-attend")
    assert (plain.recent_slots(100), early.recent_slots(100)) == (0, 1)
    assert Signal.BEFORE_ATTEND in early.needs - plain.needs


def test_layouts() -> None:
    with pytest.raises(UnsupportedLayout, match=r"Unknown layout 'rageed'\. Did you mean 'ragged'"):
        kvsieve.recipe("knorm", budget=100, layout="rageed")
    for name in ("adakv", "kvzip", "laprox", "expected-attention", "threshold"):
        with pytest.raises(UnsupportedLayout, match="unequal numbers of slots"):
            kvsieve.recipe(name, budget=200, layout="dense")
    assert kvsieve.recipe("laprox", budget=100, scope="head").layout == "dense"


@pytest.mark.parametrize(
    ("name", "scorer", "message"),
    [
        ("adakv", "full", "'full' has no scores"),
        ("adakv", "laprox", "'laprox' allocates itself"),
        ("adakv", "adakv", "'adakv' allocates itself"),
        ("adakv", "snapvk", "Unknown method 'snapvk'.*'snapkv'"),
        ("criticalkv", "full", "has no scores"),
        ("criticalkv", "nothing", "Unknown method 'nothing'"),
        ("criticalkv", "infinipot-v", "stages of its own"),
        ("criticalkv", "conf-kv", "chooses its own budget"),
        ("adakv", "dbudgetkv", "'dbudgetkv' allocates itself"),
        ("chunkkv", "dbudgetkv", "chooses slots its own way"),
        ("threshold", "full", "'full' has no scores"),
        ("threshold", "dbudgetkv", "chooses slots its own way"),
        ("threshold", "infinipot-v", "chooses slots its own way"),
    ],
)
def test_wrappers_refuse_what_they_cannot_wrap(name: str, scorer: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kvsieve.recipe(name, budget=100, scorer=scorer)


def test_wrappers_take_the_options_of_what_they_wrap() -> None:
    wrapped = kvsieve.recipe("adakv", budget=100, scorer="g-kv", window=9)
    assert wrapped.scorer == kvsieve.recipe("g-kv", budget=100, window=9).scorer
    with pytest.raises(RecipeError, match="'knorm' has no option 'window'"):
        kvsieve.recipe("adakv", budget=100, scorer="knorm", window=9)


def test_recent_may_be_a_share_of_the_budget() -> None:
    recipe = kvsieve.recipe("h2o", budget=101)
    assert recipe.recent_slots(101) == 50
    assert kvsieve.recipe("h2o", budget=101, recent=7).recent_slots(101) == 7


def test_recipes_are_frozen() -> None:
    recipe = kvsieve.recipe("knorm", budget=100)
    with pytest.raises(AttributeError):
        recipe.sinks = 3  # type: ignore[misc]


def test_protected_spans_stay() -> None:
    from models import prompt, tiny
    from running import kept

    recipe = kvsieve.recipe("knorm", budget=12, sinks=2, recent=3, protect=[(10, 14)])
    with torch.no_grad(), kvsieve.Cache(tiny("llama"), recipe) as cache:
        tiny("llama")(prompt(40), past_key_values=cache)
        for layer in kept(cache):
            for head in layer[0]:
                assert {0, 1, 10, 11, 12, 13, 37, 38, 39} <= set(head)
                assert len(head) == 12


@pytest.mark.parametrize("name", registry.methods())
def test_facts_of_methods(name: str) -> None:
    found = registry.find(name)
    assert found.name == name and found.paper
    assert found.arxiv is None or (len(found.arxiv) == 10 and found.arxiv[4] == ".")
    assert (found.year is None) == (found.certainty == "own")
    if found.arxiv:
        assert found.arxiv in found.doc
