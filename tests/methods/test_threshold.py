"""Threshold eviction: what scores too low goes once it is old enough, up to a cap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.allocators import CONDEMNED, Threshold, TopK
from kvsieve.errors import BudgetError, RecipeError
from kvsieve.interfaces import Round, Scope

from .support import Layer, Row, Run, draw, kept, norm, rows, scores

DELAY = 3


def recipe(budget: int | float = 1.0, **options: Any) -> kvsieve.Recipe:
    options = {"scorer": "knorm", "delay": DELAY} | options
    return kvsieve.recipe("threshold", budget=budget, **options)


def good(row: Row, h: int, least: float) -> list[int]:
    """The tokens whose keys are short enough, and the recent ones."""
    return [i for i in range(row.n) if -norm(row.k[h][i]) >= least or i >= row.n - DELAY]


@pytest.mark.parametrize("least", [-2.0, -1.4, -1.0, 0.0])
def test_kept_sets(least: float) -> None:
    layer = draw(S=20, padding=(0, 6), seed=1)
    got = kept(recipe(threshold=least), layer)
    assert got == [[good(row, h, least) for h in row.heads] for row in rows(layer)]
    if least == -2.0:
        assert len({len(head) for row in got for head in row}) > 1, "heads were to differ"
    if least == 0.0:
        assert got == [[[17, 18, 19]] * 2, [[11, 12, 13]] * 2]


def test_no_threshold_evicts_nothing() -> None:
    run = Run(recipe(threshold=-torch.inf), draw(S=20))
    assert run.session.removed == 0


def test_hand_example() -> None:
    keys = torch.tensor([3.0, 1.0, 2.0, 4.0, 1.0])[None, None, :, None]
    layer = Layer(queries=torch.zeros(1, 1, 1, 5, 1), keys=keys, values=keys)
    assert kept(recipe(threshold=-2.0, delay=0), layer) == [[[1, 2, 4]]]
    assert kept(recipe(threshold=-2.0, delay=2), layer) == [[[1, 2, 3, 4]]]
    assert kept(recipe(3, threshold=-2.0, delay=2), layer) == [[[1, 3, 4]]]
    assert kept(recipe(threshold=-0.5, delay=0), layer) == [[[1]]], "a head keeps one slot"


def test_the_cap_keeps_the_best_of_what_is_good_enough() -> None:
    layer, least, cap = draw(S=20, padding=(0, 6), seed=2), -1.9, 8
    run = Run(recipe(cap, threshold=least), layer)
    cut = 0
    for b, row in enumerate(rows(layer)):
        for h in row.heads:
            stay = good(row, h, least)
            old = sorted((i for i in stay if i < row.n - DELAY), key=lambda i: norm(row.k[h][i]))
            want = [*old[: cap - DELAY], *range(row.n - DELAY, row.n)]
            assert run.kept()[b][h] == sorted(want)
            cut += len(stay) > cap
    assert cut
    sizes = [sum(len(head) for head in row) / 2 for row in run.kept()]
    want_chosen = [[(n, size)] for n, size in zip((20, 14), sizes, strict=True)]
    assert run.session.report().chosen == want_chosen


def test_a_wrapped_method_shares_the_cap_as_it_shares_a_budget() -> None:
    layer, least, cap = draw(S=24, H=3, seed=3), 0.07, 9
    own = {"window": DELAY, "kernel": 1}
    base = kvsieve.recipe("adakv", budget=cap, **own)
    shared, attention = kept(base, layer), scores(layer, base)
    got = kept(recipe(cap, scorer="adakv", threshold=least, **own), layer)
    for b in range(2):
        for h in range(3):
            best = {i for i, x in enumerate(attention[b][h]) if x >= least or i >= 24 - DELAY}
            assert got[b][h] == sorted(set(shared[b][h]) & best)
    assert got != shared


def test_while_decoding_a_token_is_judged_when_it_leaves_the_window() -> None:
    layer, least = draw(S=30, seed=4), -1.7
    run = Run(recipe(threshold=least, schedule="after-prefill|each-step"), layer.part(0, 15))
    for t in range(15, 30):
        run.feed(layer.part(t, t + 1))
        want = [[good(row, h, least) for h in row.heads] for row in rows(layer.part(0, t + 1))]
        assert run.kept() == want
    assert run.session.report().decode_steps == 15


def test_a_row_that_is_fed_padding_is_not_judged_again() -> None:
    """Nothing has left a finished row's window."""
    layer = draw(S=20, seed=5)
    run = Run(recipe(threshold=-1.7, schedule="each-step"), layer.part(0, 19))
    last = layer.part(19, 20)
    live = torch.tensor([[True], [False]])
    run.feed(Layer(queries=last.queries, keys=last.keys, values=last.values, live=live))
    assert run.kept()[1] == [list(range(19))] * 2
    assert run.kept()[0] != [list(range(20))] * 2


def test_allocator_counts_condemned_slots_out() -> None:
    inf = torch.inf
    scores = [torch.tensor([[[inf, 0.3, CONDEMNED, -inf], [0.1, 0.2, 0.3, 0.4]]])]
    round = Round(
        budgets=torch.tensor([3]), layers=(0,), layer_count=1, live=[torch.tensor([[3, 4]])]
    )
    assert Threshold().allocate(scores, round)[0].tolist() == [[2, 3]]
    assert Threshold(least=0.25).allocate(scores, round)[0].tolist() == [[2, 2]]
    assert Threshold(least=9.0).allocate(scores, round)[0].tolist() == [[1, 1]]
    shared = Threshold(least=0.15, within=TopK(scope=Scope.LAYER))
    assert shared.scope is Scope.LAYER
    assert shared.allocate(scores, round)[0].tolist() == [[2, 3]]


def test_protects_the_observation_window_of_what_it_wraps() -> None:
    assert recipe(scorer="snapkv", window=8).recent == 8
    assert recipe(scorer="snapkv", window=2).recent == DELAY
    assert recipe(scorer="h2o").recent == DELAY


def test_refuses_what_has_no_meaning() -> None:
    with pytest.raises(RecipeError, match="nothing but a number"):
        recipe(threshold=float("nan"))
    with pytest.raises(RecipeError, match="give delay"):
        recipe(scorer="h2o", recent=3)
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(DELAY)
