"""CaM: evicted tokens leave a part of their values in those that follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.sketch import uniform

from .allocations import Allocations
from .support import (
    Row,
    Run,
    Vector,
    draw,
    from_attention,
    kept,
    long_layer,
    mean,
    rows,
    table,
)

BUDGET, SPAN = 7, 3


def recipe(budget: int = BUDGET, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe("cam", budget=budget, **({"span": SPAN} | options))


def drawn(h: int, position: int, seed: int = 0) -> float:
    return float(uniform(torch.tensor([[[position]]]), 0, h + 1, seed)[0, h, 0])


def merge(
    values: dict[int, Vector], received: dict[int, float], stay: list[int], h: int, span: int
) -> dict[int, Vector]:
    """One event of a head: draw, and add a share of each drawn value to the next that stay."""
    most = max(received[j] for j in stay)
    out = {j: list(values[j]) for j in stay}
    for i in values:
        if i in stay or drawn(h, i) >= min(1.0, received[i] / most):
            continue
        for j in [j for j in stay if j > i][:span]:
            out[j] = [x + y / span for x, y in zip(out[j], values[i], strict=True)]
    return out


def sums(row: Row, h: int, upto: int) -> dict[int, float]:
    """Attention received from all queries, averaged over the group."""
    seen = [[row.attention(h, g, t) for t in range(upto)] for g in row.groups]
    return {i: mean(sum(a[i] for a in head) for head in seen) for i in range(upto)}


def held(run: Run, b: int, h: int) -> dict[int, list[float]]:
    store = run.store()
    live = store.live
    there = (
        torch.ones(store.slots, dtype=torch.bool)
        if live is None
        else live.expand(*store.counts.shape, -1)[b, h]
    )
    position = store["position"].expand(*store.counts.shape, -1)[b, h][there].tolist()
    return dict(zip(position, store.values[b, h][there].tolist(), strict=True))


@pytest.mark.parametrize("layout", ["dense", "ragged"])
@pytest.mark.parametrize("span", [1, 3, 50])
def test_values_after_a_prompt(layout: str, span: int) -> None:
    layer = draw(S=24, padding=(0, 5))
    run = Run(recipe(span=span, layout=layout), layer)
    stay = kept(kvsieve.recipe("h2o", budget=BUDGET), layer)
    assert run.kept() == stay
    changed = 0
    for b, row in enumerate(rows(layer)):
        for h in row.heads:
            want = merge(dict(enumerate(row.v[h])), sums(row, h, row.n), stay[b][h], h, span)
            got = held(run, b, h)
            for j, value in want.items():
                assert got[j] == pytest.approx(value, abs=1e-5)
                changed += value != row.v[h][j]
    assert changed >= 4, "a value in every head, at least"


def test_values_while_decoding() -> None:
    """At each step one token goes; what was merged into it before goes on with it."""
    layer = draw(B=1, H=1, G=1, S=20, seed=1)
    run = Run(recipe(scorer="tova", span=2), layer.part(0, 12))
    row = rows(layer)[0]
    values = dict(enumerate(row.v[0][:12]))
    for t in range(11, 20):
        if t > 11:
            run.feed(layer.part(t, t + 1))
            values[t] = row.v[0][t]
        slots = list(values)
        logits = Row(
            q=[[[row.q[0][0][i] for i in slots]]],
            k=[[row.k[0][i] for i in slots]],
            v=[],
            scale=row.scale,
        )
        received = dict(zip(slots, logits.attention(0, 0, len(slots) - 1), strict=True))
        safe = {i: (i != t, -received[i], i) for i in slots}
        stay = sorted(sorted(slots, key=lambda i, safe=safe: safe[i])[:BUDGET])
        values = merge(values, received, stay, 0, 2)
        got = held(run, 0, 0)
        assert list(got) == stay
        for j in stay:
            assert got[j] == pytest.approx(values[j], abs=1e-5)


def test_a_token_as_strong_as_the_strongest_is_always_merged() -> None:
    """Three tokens of equal attention, two of them stay: the third goes into what follows it."""
    values = [[3.0], [6.0], [12.0], [0.0], [0.0]]
    layer = from_attention([[0.25, 0.25, 0.25, 0.25, 0.0]], values)
    for seed in range(5):
        run = Run(recipe(3, scorer="tova", span=2, seed=seed), layer)
        # Ties go to the earlier: 2 and 3 go, the last token is protected; 12 + 0 over 2 slots.
        assert run.kept() == [[[0, 1, 4]]]
        assert held(run, 0, 0) == {0: [3.0], 1: [6.0], 4: [6.0]}


def test_what_received_nothing_is_never_merged() -> None:
    values = [[3.0], [6.0], [12.0], [5.0], [0.0]]
    layer = from_attention([[0.5, 0.5, 0.0, 0.0, 0.0]], values)
    run = Run(recipe(3, scorer="tova"), layer)
    assert held(run, 0, 0) == {0: [3.0], 1: [6.0], 4: [0.0]}


def test_how_often_it_merges() -> None:
    """A fifth of the strongest's attention: in a fifth of the draws."""
    weights = [0.5, *[0.1] * 4, 0.1]
    layer = from_attention([[*weights, 0.0]], [[0.0]] + [[1.0]] * 5 + [[0.0]])
    counts = []
    for seed in range(400):
        run = Run(recipe(2, scorer="tova", span=1, seed=seed), layer)
        counts.append(held(run, 0, 0)[6][0])
    assert 0.17 < mean(counts) / 5 < 0.23


def test_merging_32k_slots_takes_less_than_the_layer() -> None:
    layer = long_layer(G=2, queries=1, seed=6)
    built = kvsieve.recipe("cam", budget=1000, scorer="tova")
    assert built.scorer is not None
    step, store = table(layer, built.scorer)
    scores = torch.rand(layer.keys.shape[:3])
    store["received"] = scores
    with Allocations([*store.table.tensors(), scores]) as made_here:
        built.compressor.compress(step, store, scores, torch.full((1, 4), 1000))
    assert store.counts.tolist() == [[1000] * 4]
    assert made_here.peak <= 4 * (layer.keys.numel() + layer.values.numel())


@pytest.mark.parametrize("wrong", [{"scorer": "keydiff"}, {"span": 0}], ids=str)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)


@pytest.mark.parametrize("scorer", ["cam", "momentkv"])
def test_criticalkv_refuses_methods_that_do_more_than_evict(scorer: str) -> None:
    with pytest.raises(RecipeError, match=scorer):
        kvsieve.recipe("criticalkv", budget=50, scorer=scorer)
