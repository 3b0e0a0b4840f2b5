"""DBudgetKV: the budget of a layer is what the norm of the last query's attention allows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.errors import BudgetError, RecipeError
from kvsieve.methods.dbudgetkv import NormStop

from .allocations import Allocations
from .support import Row, Run, draw, from_attention, kept, mean, norm, rows, table

W = 3


def recipe(budget: int | float = 1.0, **options: Any) -> kvsieve.Recipe:
    options = {"sinks": 2, "window": W, "whole": 0} | options
    return kvsieve.recipe("dbudgetkv", budget=budget, **options)


def removal_orders(row: Row, order: str, sinks: int) -> list[list[int]]:
    """The candidates of each head, the first to go first."""
    if order == "position":
        return [list(range(sinks, row.n)) for _ in row.heads]
    orders = []
    for h in row.heads:
        total = [
            sum(row.attention(h, g, t)[i] for g in row.groups for t in range(row.n - W, row.n))
            for i in range(row.n)
        ]
        orders.append(sorted(range(sinks, row.n - W), key=lambda i: total[i]))
    return orders


def brute_force(row: Row, tolerance: float, order: str, metric: str, sinks: int) -> list[list[int]]:
    """Try every cut c; return what stays."""
    orders = removal_orders(row, order, sinks)
    last = [(h, row.attention(h, g, row.n - 1)) for h in row.heads for g in row.groups]

    def length(c: int) -> float:
        norms = []
        for h, a in last:
            left = set(orders[h][c:])
            if metric == "full":
                left |= set(range(row.n)) - set(orders[h])
            norms.append(norm([a[i] for i in left]))
        return mean(norms)

    base = length(0)
    cuts = [c for c in range(len(orders[0]) + 1) if (base - length(c)) / base <= tolerance]
    return [sorted(set(range(row.n)) - set(x[: max(cuts)])) for x in orders]


@pytest.mark.parametrize("metric", ["candidates", "full"])
@pytest.mark.parametrize("order", ["position", "attention"])
@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.4])
def test_kept_sets_are_those_of_trying_every_cut(tolerance: float, order: str, metric: str) -> None:
    layer = draw(B=3, S=24, padding=(0, 7, 15), seed=1)
    layer.queries.mul_(2.0)
    got = kept(recipe(tolerance=tolerance, order=order, metric=metric), layer)
    want = [brute_force(row, tolerance, order, metric, 2) for row in rows(layer)]
    assert got == want
    if tolerance == 0.1:
        assert len({len(row[0]) for row in got}) > 1, "rows were to choose for themselves"


@pytest.mark.parametrize(("tolerance", "cut"), [(0.01, 0), (0.05, 1), (0.1, 2), (0.2, 3)])
def test_hand_example(tolerance: float, cut: int) -> None:
    layer = from_attention([[0.1, 0.2, 0.2, 0.5]])
    assert kept(recipe(tolerance=tolerance, sinks=0), layer) == [[list(range(cut, 4))]]


def test_no_tolerance_removes_what_has_no_weight() -> None:
    layer = from_attention([[0.0, 0.0, 0.2, 0.0, 0.8]])
    assert kept(recipe(tolerance=0.0, sinks=0), layer) == [[[2, 3, 4]]]


def test_all_tolerance_removes_everything_removable() -> None:
    layer = draw(S=16, padding=(0, 3))
    assert kept(recipe(tolerance=1.0), layer) == [[[0, 1]] * 2] * 2
    assert kept(recipe(tolerance=1.0, sinks=0), layer) == [[[0]] * 2] * 2, "a head keeps one slot"


def test_a_higher_tolerance_never_keeps_more() -> None:
    layer = draw(B=4, S=30, seed=2)
    tolerances = [0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 0.7]
    sizes = [[len(row[0]) for row in kept(recipe(tolerance=t), layer)] for t in tolerances]
    for more, less in pairwise(sizes):
        assert all(a >= b for a, b in zip(more, less, strict=True))
    assert sum(sizes[0]) > sum(sizes[3]) > sum(sizes[-1])


def test_all_weight_on_the_last_token_removes_the_rest_but_the_sinks() -> None:
    layer = from_attention([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    assert kept(recipe(tolerance=0.0), layer) == [[[0, 1, 5]]]


def test_no_weight_on_any_candidate_removes_nothing() -> None:
    layer = from_attention([[0.5, 0.5, 0.0, 0.0, 0.0]])
    assert kept(recipe(tolerance=0.5), layer) == [[[0, 1, 2, 3, 4]]]


def stop(attention: Tensor, tolerance: float, metric: Any = "candidates") -> list[int]:
    """How many candidates stay, of ``attention [B, H, G, S]``, the oldest going first."""
    scorer = NormStop(
        order="position", metric=metric, tolerance=tolerance, sinks=0, queries=1, whole=0
    )
    rank = torch.arange(attention.shape[-1]).float().expand(*attention.shape[:2], -1)
    return scorer.stop(attention, rank, torch.ones_like(rank, dtype=torch.bool)).tolist()


@pytest.mark.parametrize(("n", "tolerance", "cut"), [(1000, 0.01, 19), (101, 0.1, 19), (9, 0.5, 6)])
def test_uniform_attention(n: int, tolerance: float, cut: int) -> None:
    """rho(c) = 1 - sqrt(1 - c / n), so that c* = floor(n (1 - (1 - tau)^2))."""
    assert stop(torch.full((1, 2, 2, n), 1 / n), tolerance) == [n - cut]


def test_scale_copies_and_order_of_heads_change_nothing() -> None:
    made = torch.Generator().manual_seed(3)
    attention = torch.rand(3, 2, 2, 40, generator=made).pow(4)
    want = stop(attention, 0.05)
    assert len(set(want)) > 1
    assert stop(attention * 7, 0.05) == want
    assert stop(attention.repeat(1, 2, 1, 1), 0.05) == want
    assert stop(attention.flip(1, 2), 0.05) == want


def test_the_budget_is_a_cap_that_is_kept_in_the_same_order() -> None:
    layer = draw(B=3, S=24, seed=4)
    free = kept(recipe(tolerance=0.05), layer)
    sizes = [len(row[0]) for row in free]
    cap = sorted(sizes)[1]
    assert min(sizes) < cap < max(sizes)
    capped = kept(recipe(cap, tolerance=0.05), layer)
    for before, after in zip(free, capped, strict=True):
        for head, left in zip(before, after, strict=True):
            assert left == [*head[:2], *head[2:][len(head) - min(cap, len(head)) :]]


def test_order_by_position_is_streaming_llm_of_that_budget() -> None:
    layer = draw(B=1, S=24, seed=5)
    got = kept(recipe(tolerance=0.1), layer)
    same = kvsieve.recipe("streaming-llm", budget=len(got[0][0]), sinks=2)
    assert len(got[0][0]) < 24 and kept(same, layer) == got


def test_the_report_states_what_was_chosen() -> None:
    first, second = draw(S=24, padding=(0, 6), seed=6), draw(S=24, padding=(0, 6), seed=7)
    run = Run(recipe(tolerance=0.1, whole=1), first, second)
    report = run.session.report()
    sizes = [len(row[0]) for row in run.kept(1)]
    assert run.kept(0) == [[list(range(n))] * 2 for n in (24, 18)]
    assert report.budget == "100%"
    assert report.chosen == [[(n, (n + size) / 2)] for n, size in zip((24, 18), sizes, strict=True)]
    share = mean((n + size) / 2 / n for n, size in zip((24, 18), sizes, strict=True))
    assert report.chosen_share == pytest.approx(share)
    assert f"it chose {share:.1%} of the tokens" in str(report)
    assert report.to_dict()["chosen"] == report.chosen


def test_a_run_that_removes_nothing_of_its_own_is_no_error() -> None:
    run = Run(recipe(tolerance=0.0), draw(S=12))
    assert run.session.report().removed == 0
    assert run.session.report().chosen_share == 1.0


def test_decoding_adds_a_slot_a_step() -> None:
    layer = draw(S=24, seed=8)
    run = Run(recipe(tolerance=0.1), layer.part(0, 20))
    before = run.kept()
    for t in range(20, 24):
        run.feed(layer.part(t, t + 1))
    assert run.kept() == [[[*head, *range(20, 24)] for head in row] for row in before]


def test_a_later_part_is_looked_at_anew() -> None:
    layer = draw(B=1, S=30, seed=9)
    run = Run(recipe(tolerance=0.2), layer.part(0, 20))
    held = run.kept()[0][0]
    run.feed(layer.part(20, 30))
    row, left = rows(layer)[0], [*held, *range(20, 30)]
    want = brute_force(subset(row, left), 0.2, "position", "candidates", 2)[0]
    assert run.kept()[0][0] == [left[i] for i in want]
    assert len(want) < len(left)
    assert [seen for seen, _ in run.session.report().chosen[0]] == [20, 30]  # type: ignore[index]


def subset(row: Row, left: list[int]) -> Row:
    """The row as if it had held those tokens only."""
    return Row(
        q=[[[q[i] for i in left] for q in group] for group in row.q],
        k=[[k[i] for i in left] for k in row.k],
        v=[[v[i] for i in left] for v in row.v],
        scale=row.scale,
    )


def test_works_beside_the_layer() -> None:
    B, H, G, S, D = 1, 2, 4, 8192, 64
    layer = draw(B=B, H=H, G=G, S=S, D=D)
    scorer = recipe(order="attention", window=8).scorer
    assert scorer is not None
    with Allocations([layer.queries, layer.keys, layer.values]) as seen:
        step, store = table(layer, scorer)
        before = seen.held
        scorer.score(step, store)
        assert seen.peak - before < 2 * B * H * S * D * 4, "the size of the layer itself"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "norm"}, "order='norm'"),
        ({"metric": "all"}, "metric='all'"),
        ({"tolerance": -0.1}, "negative"),
        ({"tolerance": float("nan")}, "negative"),
        ({"whole": -1}, "negative"),
        ({"window": 0}, "1 query or more"),
    ],
)
def test_refuses_what_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**options)


def test_refuses_a_cap_that_protection_fills() -> None:
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(5, order="attention")
