"""Scores and kept sets of an-yongqi/rest-kv, setting by setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.step import LayerInfo

from .recorded import Recorded, kept, load, prefilled

WINDOW, BUDGET = 8, 20
SETTINGS: dict[str, dict[str, Any]] = {
    "after": {},
    "after_drift": {"beta": 0.77, "kernel": 1},
    "after_values": {"projected": False, "alpha": 0.6},
    "after_squared": {"power": 2.0},
    "before": {"form": "paper"},
    "before_drift": {"form": "paper", "beta": 1.3},
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def recipe_of(setting: str, **more: Any) -> kvsieve.Recipe:
    options = {"window": WINDOW, "kernel": 5} | SETTINGS[setting] | more
    return kvsieve.recipe("rest-kv", budget=BUDGET, **options)


def layer() -> Recorded:
    tensors = load("restkv")[0]
    query, key = tensors["query"], tensors["key"]
    _, H, G, _, D = query.shape
    w_o = tensors["w_o"].view(-1, H, G, D).permute(1, 2, 3, 0)  # [H, G, D, C]
    return Recorded(
        query=query,
        key=key,
        value=tensors["value"],
        scale=D**-0.5,
        info=LayerInfo(ordinal=0, output_projection=lambda: w_o),
    )


def scores(recipe: kvsieve.Recipe) -> Tensor:
    step, store = prefilled(recipe, layer())
    step.budgets = torch.full_like(store.seen, BUDGET)
    assert recipe.scorer is not None
    return recipe.scorer.score(step, store)[..., :-WINDOW]


@each_setting
def test_scores(setting: str) -> None:
    want = load("restkv")[0][
        f"{setting}.score"
    ]  # [B, H, G, m]: the peer has a cache per query head
    for gqa, merged in (("mean", want.mean(2)), ("max", want.amax(2))):
        torch.testing.assert_close(
            scores(recipe_of(setting, gqa=gqa)), merged, rtol=1e-4, atol=1e-6
        )


@each_setting
def test_kept_sets(setting: str) -> None:
    want = load("restkv")[0][f"{setting}.score"].mean(2)
    mask = torch.zeros(*want.shape[:2], want.shape[-1] + WINDOW, dtype=torch.bool)
    mask[..., -WINDOW:] = True
    mask.scatter_(2, want.topk(BUDGET - WINDOW, dim=-1).indices, True)
    assert torch.equal(kept(recipe_of(setting), [layer()])[0], mask)


def test_the_recorded_heads_drift_both_ways() -> None:
    """Smoothing that moves is what the drift settings are about: without it, scores differ."""
    for setting in ("after_drift", "before_drift"):
        still = scores(recipe_of(setting, beta=1e6))
        want = load("restkv")[0][f"{setting}.score"].mean(2)
        for b in (0, 1):
            assert not torch.allclose(still[b], want[b], rtol=0.1)
