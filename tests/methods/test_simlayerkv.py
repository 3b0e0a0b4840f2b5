"""SimLayerKV: the layers that look at their middle tokens least keep their ends only."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve.allocators import LazyLayers
from kvsieve.errors import BudgetError, RecipeError
from kvsieve.interfaces import Round

from .support import Layer, Row, Run, draw, mean, rows, scores

SINKS, WINDOW = 2, 4
ENDS = SINKS + WINDOW


def recipe(budget: int, **options: int) -> kvsieve.Recipe:
    options = {"sinks": SINKS, "window": WINDOW} | options
    return kvsieve.recipe("simlayerkv", budget=budget, **options)


def lazy(row: Row, queries: int = 1) -> float:
    """The paper's measure: attention on the first and last tokens."""
    ends = {*range(SINKS), *range(row.n - WINDOW, row.n)}
    return mean(
        sum(a for i, a in enumerate(row.attention(h, g, t)) if i in ends)
        for h in row.heads
        for g in row.groups
        for t in range(row.n - queries, row.n)
    )


def layers(count: int, *, S: int = 20, padding: tuple[int, ...] = (), seed: int = 0) -> list[Layer]:
    """Layers of unlike laziness: the larger their queries, the less they look at all tokens."""
    drawn = [draw(S=S, padding=padding, seed=seed + i) for i in range(count)]
    for i, layer in enumerate(drawn):
        layer.queries.mul_(0.5 + i)
    return drawn


def ends(n: int) -> list[int]:
    return [*range(SINKS), *range(n - WINDOW, n)]


@pytest.mark.parametrize("queries", [1, 3])
def test_score(queries: int) -> None:
    layer = draw(S=20, padding=(0, 5))
    got = scores(layer, recipe(10, queries=queries))
    for row, heads in zip(rows(layer), got, strict=True):
        need = 1 - lazy(row, queries)
        want = [need * (1 + i / row.n) / 2 for i in range(row.n)]
        for head in heads:
            assert head == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("cut", range(5))
def test_a_budget_that_a_threshold_would_give_keeps_what_it_would(cut: int) -> None:
    drawn = layers(4)
    measures = [[lazy(row) for row in rows(layer)] for layer in drawn]
    for b in range(2):
        threshold = sorted((m[b] for m in measures), reverse=True)[cut - 1] if cut else 1.0
        want = [ends(20) if m[b] >= threshold else list(range(20)) for m in measures]
        total = sum(map(len, want))
        if total % 4 or total == 4 * ENDS:
            continue
        run = Run(recipe(total // 4), *drawn)
        assert [run.kept(i)[b] for i in range(4)] == [[x, x] for x in want]


def test_the_layer_on_the_line_keeps_its_newest_tokens() -> None:
    drawn = layers(3, padding=(0, 3))
    run = Run(recipe(11), *drawn)
    for b, n in enumerate((20, 17)):
        order = sorted(range(3), key=lambda i: lazy(rows(drawn[i])[b]))
        spare = 3 * 11 - 3 * ENDS
        for i in order:
            given = min(spare, n - ENDS)
            spare -= given
            want = sorted({*ends(n), *range(n - WINDOW - given, n)})
            assert run.kept(i)[b] == [want, want]
        assert spare == 0


def test_hand_example() -> None:
    inf = torch.inf
    need = ([0.2, 0.3], [0.6, 0.7], [0.1, 0.4])
    given = [torch.tensor([[[inf, *x, *x, inf]] * 2]) for x in need]
    for budget, want in ((2, [2, 2, 2]), (3, [2, 5, 2]), (4, [2, 6, 4]), (5, [3, 6, 6])):
        round = Round(
            budgets=torch.tensor([budget]),
            layers=(0, 1, 2),
            layer_count=3,
            live=[torch.full((1, 2), 6)] * 3,
        )
        counts = LazyLayers().allocate(given, round)
        assert [count.tolist() for count in counts] == [[[n, n]] for n in want]


def test_ties_go_to_the_earlier_layer_and_missing_slots_are_not_counted() -> None:
    given = [torch.tensor([[[torch.inf, 0.5, 0.5, -torch.inf]]])] * 3
    round = Round(
        budgets=torch.tensor([2]), layers=(0, 1, 2), layer_count=3, live=[torch.tensor([[3]])] * 3
    )
    counts = LazyLayers().allocate(given, round)
    assert [int(count) for count in counts] == [3, 2, 1]


def test_a_later_turn_counts_anew() -> None:
    drawn = layers(2, S=30)
    run = Run(recipe(9), *(layer.part(0, 18) for layer in drawn))
    run.feed(*(layer.part(18, 30) for layer in drawn))
    for b in range(2):
        for h in range(2):
            held = [run.kept(i)[b][h] for i in range(2)]
            assert sum(map(len, held)) == 18
            assert all(set(ends(30)) <= set(x) for x in held)


def test_refuses_what_leaves_no_choice() -> None:
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(ENDS)
    with pytest.raises(RecipeError, match="1 query or more"):
        recipe(10, queries=0)
    for wrapper in ("adakv", "chunkkv"):
        with pytest.raises(RecipeError, match=wrapper):
            kvsieve.recipe(wrapper, scorer="simlayerkv", budget=10)
