"""CriticalKV: attention decides the first half, attention times projected value the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvsieve

from .support import Layer, Row, Vector, best, draw, kept, mean, project, rows, scores

EPSILON = 1e-4


def projected_l1(layer: Layer, row: Row, h: int) -> Vector:
    assert layer.w_o is not None
    matrices = layer.w_o[h].double().tolist()
    return [mean(sum(map(abs, project(v, w))) for w in matrices) for v in row.v[h]]


def two_stages(base: Vector, norms: Vector, count: int, first: int, protected: range) -> list[int]:
    certain = best(base, first, protected)
    weighted = [(s + EPSILON) * x for s, x in zip(base, norms, strict=True)]
    return best(weighted, count, {*certain, *protected})


@pytest.mark.parametrize("first", [0.0, 0.3, 0.5, 1.0])
def test_kept_set_over_snapkv(first: float) -> None:
    layer = draw(S=24, padding=(0, 5))
    assert layer.values is not None
    layer.values[:, :, ::3] *= 4  # values that matter in the second stage
    snap = scores(layer, kvsieve.recipe("snapkv", budget=10, window=2, kernel=3))
    want = [
        [
            two_stages(
                base, projected_l1(layer, row, h), 10, int(10 * first), range(row.n - 2, row.n)
            )
            for h, base in enumerate(heads)
        ]
        for row, heads in zip(rows(layer), snap, strict=True)
    ]
    got = kept(kvsieve.recipe("criticalkv", budget=10, window=2, kernel=3, first=first), layer)
    assert got == want
    if first == 1.0:
        assert got == kept(kvsieve.recipe("snapkv", budget=10, window=2, kernel=3), layer)


def test_values_of_equal_projected_norm_keep_the_base_set() -> None:
    layer = draw(S=20, seed=1)
    signs = torch.where(layer.values > 0, 1.0, -1.0)
    layer = replace(layer, values=signs, w_o=(0.7 * torch.eye(4)).expand(2, 2, 4, 4))
    base = kvsieve.recipe("snapkv", budget=8, window=2)
    assert kept(kvsieve.recipe("criticalkv", budget=8, window=2), layer) == kept(base, layer)


def test_a_large_value_is_kept_in_the_second_stage_only() -> None:
    # H2O sums over random attention; slot 9's value is a thousand times the others'.
    layer = draw(B=1, H=1, S=12, seed=2)
    layer.values[0, 0, 9] *= 1000
    sums = scores(layer, kvsieve.recipe("h2o", budget=4))[0][0]
    base = best(sums, 4)
    assert 9 not in base, "draw another seed: the example needs a slot that attention drops"
    options = {"scorer": "h2o", "budget": 4, "recent": 0}
    assert 9 in kept(kvsieve.recipe("criticalkv", first=0.5, **options), layer)[0][0]
    assert kept(kvsieve.recipe("criticalkv", first=1.0, **options), layer) == [[base]]


def test_under_adakv_counts_come_from_the_base_scores() -> None:
    layer = draw(H=3, S=24, seed=3)
    layer.queries[:, 0] *= 3  # a head with sharp attention
    budget, window, floor = 8, 2, 0.4
    snap = scores(layer, kvsieve.recipe("snapkv", budget=budget, window=window, kernel=3))
    base = kvsieve.recipe("adakv", budget=budget, window=window, kernel=3, floor=floor)
    counts = [[len(head) for head in row] for row in kept(base, layer)]
    assert len({n for row in counts for n in row}) > 1
    protected = range(24 - window, 24)
    want = [
        [
            two_stages(
                snap[b][h],
                projected_l1(layer, row, h),
                counts[b][h],
                max(int(budget * floor), counts[b][h] // 2),
                protected,
            )
            for h in row.heads
        ]
        for b, row in enumerate(rows(layer))
    ]
    both = kvsieve.recipe(
        "adakv", scorer="criticalkv", budget=budget, window=window, kernel=3, floor=floor
    )
    assert kept(both, layer) == want
