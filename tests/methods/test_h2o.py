"""H2O: the sum of the attention a slot has received from every query so far."""

from __future__ import annotations

import pytest
import torch

import kvsieve

from .support import (
    Layer,
    Row,
    Run,
    Vector,
    assert_close,
    best,
    draw,
    expected,
    kept,
    mean,
    real_only,
    rows,
    scores,
    table,
)


def formula(row: Row, h: int) -> Vector:
    given = [[row.attention(h, g, t) for t in range(row.n)] for g in row.groups]
    return [
        sum(mean(given[g][t][i] for g in row.groups) for t in range(row.n)) for i in range(row.n)
    ]


def test_score_is_the_sum_over_all_queries() -> None:
    layer = draw(padding=(0, 3))
    got = scores(layer, kvsieve.recipe("h2o", budget=4))
    assert_close(got, expected(layer, formula))
    for row, n in zip(got, (12, 9), strict=True):
        for head in row:
            assert sum(head) == pytest.approx(n, abs=1e-4)  # every query gives 1 in all


def test_normalised_score_is_per_query_that_could_see_the_slot() -> None:
    layer = draw(padding=(0, 3))

    def per_query(row: Row, h: int) -> Vector:
        return [x / (row.n - i) for i, x in enumerate(formula(row, h))]

    got = scores(layer, kvsieve.recipe("h2o", budget=4, normalise=True))
    assert_close(got, expected(layer, per_query))
    assert max(x for row in got for head in row for x in head) <= 1


def test_kept_set_is_half_heavy_half_recent() -> None:
    layer = draw(padding=(0, 3), seed=1)
    want = [
        [best(head, 6, range(len(head) - 3, len(head))) for head in row]
        for row in expected(layer, formula)
    ]
    assert kept(kvsieve.recipe("h2o", budget=6), layer) == want


@pytest.mark.parametrize("normalise", [False, True])
def test_chunks_add_up_to_one_prompt(normalise: bool) -> None:
    layer = draw(padding=(0, 3), seed=2)
    recipe = kvsieve.recipe("h2o", budget=12, normalise=normalise)
    chunked = Run(recipe, layer.part(0, 7))
    chunked.feed(layer.part(7, 12))
    assert recipe.scorer is not None
    step, _ = table(layer, recipe.scorer)
    got = real_only(recipe.scorer.score(step, chunked.store()), layer)
    assert_close(got, scores(layer, recipe))


@pytest.mark.parametrize("normalise", [False, True])
def test_sums_are_carried_with_the_slots_while_decoding(normalise: bool) -> None:
    """A plain simulation of the paper's loop: add the new query's attention, drop the lowest."""
    layer = draw(B=1, H=2, S=18, seed=3)
    budget, recent = 6, 3
    run = Run(
        kvsieve.recipe("h2o", budget=budget, recent=recent, normalise=normalise), layer.part(0, 9)
    )
    simulated = [Head(rows(layer)[0], h, normalise) for h in range(2)]
    for head in simulated:
        for t in range(9):
            head.see(t)
        head.drop(budget, recent)
    assert run.kept()[0] == [head.slots for head in simulated]
    for t in range(9, 18):
        run.feed(layer.part(t, t + 1))
        for head in simulated:
            head.see(t)
            head.drop(budget, recent)
        assert run.kept()[0] == [head.slots for head in simulated]


class Head:
    """One KV head of the paper's loop."""

    def __init__(self, row: Row, h: int, normalise: bool) -> None:
        self.row, self.h, self.normalise = row, h, normalise
        self.slots: list[int] = []
        self.sums: dict[int, float] = {}
        self.visits: dict[int, int] = {}

    def see(self, t: int) -> None:
        row, h = self.row, self.h
        self.slots.append(t)
        for g in row.groups:
            weights = row.attention_to(self.slots, h, g, t)
            for i, weight in zip(self.slots, weights, strict=True):
                self.sums[i] = self.sums.get(i, 0.0) + weight / len(row.groups)
        for i in self.slots:
            self.visits[i] = self.visits.get(i, 0) + 1

    def drop(self, budget: int, recent: int) -> None:
        score = [self.sums[i] / (self.visits[i] if self.normalise else 1) for i in self.slots]
        n = len(score)
        self.slots = [self.slots[j] for j in best(score, budget, range(n - recent, n))]


def test_a_finished_row_of_the_batch_stays_finite() -> None:
    """A row that gets padding while the other decodes has slots that no query has visited."""
    layer = draw(B=2, S=9, seed=4)
    run = Run(kvsieve.recipe("h2o", budget=6, normalise=True), layer.part(0, 8))
    last = layer.part(8, 9)
    before = run.kept()[1]
    run.feed(
        Layer(
            queries=last.queries,
            keys=last.keys,
            values=last.values,
            live=torch.tensor([[True], [False]]),
        )
    )
    assert run.kept()[1] == before
    assert [len(head) for head in run.kept()[0]] == [6, 6]
