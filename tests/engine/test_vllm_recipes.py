"""What becomes of recipes in vLLM, and which it refuses: known without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

import kvsieve
from kvsieve.columns import ColumnSchedule
from kvsieve.engines.vllm.effective import _WHY_NOT, NEAREST, SHOWN, effective
from kvsieve.engines.vllm.settings import Settings
from kvsieve.errors import BudgetError, EngineError, RecipeError, UnsupportedSignal
from kvsieve.interfaces import Signal
from kvsieve.registry import methods

ABLE = [name for name, entry in methods().items() if "vllm" in entry.engines]


def made(method: str, budget: Any = 1024, block: int = 32, **options: Any) -> Any:
    return effective(kvsieve.recipe(method, budget=budget, **options), block)


def test_budget_and_interval_are_rounded_to_blocks_and_say_so() -> None:
    one = made("g-kv", 1000, interval=100)
    assert (one.columns.budget, one.columns.interval) == (992, 128)
    assert one.recipe.budget is not None and one.recipe.budget.value == 992
    assert one.recipe.schedule == ColumnSchedule(one.columns)
    text = str(one)
    assert "budget 1000 rounded down" in text and "interval 100 rounded up" in text
    assert "992 slots per head = 31 blocks of 32" in text
    assert "rounded" not in str(made("g-kv", 1024, interval=128))


@pytest.mark.parametrize(
    ("schedule", "interval", "decode"),
    [
        ("after-prefill", 32, False),
        ("after-prefill|every:128", 128, True),
        ("after-prefill|every:130", 160, True),
        ("after-prefill|each-step", 32, True),
        ("above:1100", 96, True),
        ("after-prefill|every:512|every:64", 64, True),
    ],
)
def test_schedules_become_intervals(schedule: str, interval: int, decode: bool) -> None:
    columns = made("keydiff", schedule=schedule).columns
    assert (columns.interval, columns.decode) == (interval, decode)


def test_snapkv_leaves_decoding_alone_as_in_its_paper() -> None:
    one = made("snapkv")
    assert not one.columns.decode and "not while decoding" in str(one)
    with pytest.raises(RecipeError, match=r"after-prefill\|every:32"):
        effective(kvsieve.recipe("snapkv", budget=64), 32, "chunk")


@pytest.mark.parametrize(
    ("method", "options", "error", "says"),
    [
        ("adakv", {}, RecipeError, "heads unequal.*Nearest possible recipe: snapkv"),
        ("pyramidkv", {}, RecipeError, "layers unequal.*Nearest possible recipe: snapkv"),
        (
            "simlayerkv",
            {"recent": 16},
            RecipeError,
            "layers unequal.*Nearest possible recipe: streaming-llm",
        ),
        ("laprox", {}, RecipeError, "scope 'model'.*laprox with scope='head'"),
        ("expected-attention", {}, RecipeError, "expected-attention with adaptive=False"),
        ("distinct-keys", {"adaptive": True}, RecipeError, "distinct-keys with adaptive=False"),
        ("distinct-keys", {"history": 1.0}, UnsupportedSignal, "attention sums.*history=0"),
        ("h2o", {}, UnsupportedSignal, "attention sums.*tova or g-kv"),
        ("kvzip", {}, UnsupportedSignal, "replay of the prompt.*Nearest"),
        ("keydiff", {"rerotate": True}, UnsupportedSignal, "re-rotation.*of their tokens"),
        ("conf-kv", {}, UnsupportedSignal, "attention sums"),
        ("hash-evict", {}, UnsupportedSignal, "eviction before attention.*in one call"),
        ("keydiff", {"layout": "ragged"}, RecipeError, "layout='ragged'"),
        ("compactor", {}, RecipeError, "not been checked in vLLM.*leverage"),
        ("keydiff", {"schedule": "every:128"}, RecipeError, "leaves the prompt whole"),
        ("keydiff", {"schedule": "above:10"}, RecipeError, "due below the budget"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    method: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        made(method, **options)


def test_every_signal_is_shown_or_its_refusal_says_why() -> None:
    assert set(Signal) == SHOWN | set(_WHY_NOT) and not SHOWN & set(_WHY_NOT)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("10%", "Give slots per head"),
        ("2GiB", "Give slots per head"),
        (31, "below one block of 32"),
    ],
)
def test_budgets_that_cannot_be_honoured(budget: Any, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        made("keydiff", budget)


def test_a_budget_that_rounding_fills_is_refused() -> None:
    kvsieve.recipe("snapkv", budget=63, window=32)
    with pytest.raises(BudgetError, match="no room beside what is protected"):
        made("snapkv", 63, window=32)


def test_what_is_named_as_nearest_can_be_had() -> None:
    for told in NEAREST.values():
        name, _, options = told.split(" or ")[0].partition(" with ")
        pairs = [pair.split("=") for pair in options.split(" and ")] if options else []
        values = {"False": False, "0": 0.0, "'head'": "head"}
        if name in ABLE:
            made(name, **{key: values[value] for key, value in pairs})
    assert set(NEAREST) <= set(methods())


@pytest.mark.parametrize("name", ABLE)
def test_every_method_that_says_vllm_can_be_built(name: str) -> None:
    options: dict[str, Any] = {
        "laprox": {"scope": "head"},
        "expected-attention": {"adaptive": False},
    }.get(name, {})
    assert made(name, **options).recipe.compresses


def test_settings_take_a_recipe_s_plain_form() -> None:
    recipe = kvsieve.recipe("g-kv", budget=1024, window=8, protect=[(0, 4)])
    read = Settings.read({"kvsieve": recipe.to_dict() | {"policy": "chunk"}, "other": 1})
    assert read is not None
    assert read.recipe == recipe and read.policy == "chunk" and not read.poison


@pytest.mark.parametrize("nothing", [None, {}, {"other": {}}, {"kvsieve": {"method": "full"}}])
def test_settings_without_a_recipe(nothing: Any) -> None:
    assert Settings.read(nothing) is None


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("kvsieve", EngineError, "additional_config is a str"),
        ({"kvsieve": "g-kv"}, RecipeError, "plain form"),
        ({"kvsieve": {"budget": 4}}, RecipeError, "needs a 'method'"),
        ({"kvsieve": {"method": "g-kw", "budget": 64}}, RecipeError, "g-kv"),
        ({"kvsieve": {"method": "g-kv"}}, BudgetError, "needs a budget"),
        ({"kvsieve": {"method": "g-kv", "budget": 64, "windw": 8}}, RecipeError, "window"),
        (
            {"kvsieve": {"method": "g-kv", "budget": 64, "policy": "never"}},
            RecipeError,
            "Unknown policy 'never'",
        ),
        ({"kvsieve": {"method": "g-kv", "budget": 64, "poison": 1}}, RecipeError, "poison"),
        ({"kvsieve": {"method": "adakv", "budget": 64}}, RecipeError, "snapkv"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    given: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Settings.read(given)
