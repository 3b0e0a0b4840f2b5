"""Q-Filters: keys are scored by their projection on the direction of the head's queries."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve import Recipe
from kvsieve.collector import Collector
from kvsieve.errors import UnsupportedSignal
from kvsieve.statistics import Identity

from .allocations import Allocations
from .calibrated import given, random
from .support import FULL, Row, Run, assert_close, best, dot, draw, expected, kept, scores, table

FILTERS = random(3, 2, 4)


def recipe(budget: int = 6, **options: object) -> Recipe:
    stats = given(query_filter=FILTERS)
    return kvsieve.recipe("q-filters", budget=budget, **{"stats": stats, "recent": 2, **options})


@pytest.mark.parametrize("ordinal", [0, 2])
def test_score(ordinal: int) -> None:
    layer = draw(S=12, padding=(0, 5))

    def formula(row: Row, h: int) -> list[float]:
        return [dot(FILTERS[ordinal, h].tolist(), k) for k in row.k[h]]

    assert_close(scores(layer, recipe(), ordinal), expected(layer, formula))


def test_kept_set() -> None:
    layer = draw(S=14, padding=(0, 3), seed=1)
    want = []
    for b, row in enumerate(scores(layer, recipe())):
        n = 14 - (0, 3)[b]
        want.append([best(head, 6, range(n - 2, n)) for head in row])
    assert kept(recipe(), layer) == want


def test_while_decoding_each_interval() -> None:
    layer = draw(B=1, S=20, seed=2)
    run = Run(recipe(interval=4), layer.part(0, 14))
    for t in range(14, 18):
        run.feed(layer.part(t, t + 1))
    for h, slots in enumerate(run.kept()[0]):
        project = [dot(FILTERS[0, h].tolist(), layer.keys[0, h, i].tolist()) for i in range(18)]
        held = [*best(project[:14], 6, (12, 13)), 14, 15, 16, 17]
        left = best([project[i] for i in held], 6, (8, 9))
        assert slots == [held[j] for j in left]


def test_calibrated_filters_find_what_queries_look_at() -> None:
    """Queries of one direction: the filter is it, and keeps the keys that they give most weight."""
    layer = draw(B=1, H=1, G=2, S=40, angles=(0.0,), seed=3)
    layer.queries[:] = 0.1 * layer.queries + torch.tensor([1.0, -2.0, 0.5, 0.0])
    collector = Collector(sinks=4)
    Run(Recipe(method="calibrate", scorer=collector), layer)
    who = Identity(architecture="", layers=1, heads=1, group=2, head_dim=4, sample=torch.zeros(1))
    stats = collector.statistics(who)
    run = Run(recipe(10, stats=stats, recent=0), layer)
    mean = layer.queries[0, 0].mean((0, 1))
    want = (layer.keys[0, 0] @ mean).topk(10).indices.sort().values.tolist()
    assert len(set(run.kept()[0][0]) & set(want)) >= 9


def test_no_statistics_is_an_error_that_says_what_to_do() -> None:
    layer = draw(angles=FULL)
    with pytest.raises(UnsupportedSignal, match=r"needs statistics.*`kvsieve calibrate"):
        scores(layer, recipe(stats=None))
    gates = given(head_gate=torch.zeros(1, 2))
    with pytest.raises(UnsupportedSignal, match="has no query_filter, only head_gate"):
        recipe(stats=gates)


def test_memory_stays_beside_the_layer() -> None:
    layer = draw(B=1, H=4, G=1, S=40_000, D=64)
    made = recipe(stats=given(query_filter=random(1, 4, 64)))
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    with Allocations(store.table.tensors()) as work:
        made.scorer.score(step, store)
    assert work.peak < store.keys.numel() * 4 // 2
