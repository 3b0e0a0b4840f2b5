"""MomentKV: attention times what a summary of evicted slots leaves of the value, in rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError

from .allocations import Allocations
from .support import (
    Layer,
    Row,
    Run,
    Vector,
    draw,
    from_attention,
    kept,
    long_layer,
    rows,
    table,
    window_attention,
)

W, SINKS, KERNEL, BUDGET = 3, 2, 3, 9


def recipe(budget: int = BUDGET, **options: Any) -> kvsieve.Recipe:
    small = {"window": W, "kernel": KERNEL, "sinks": SINKS, "rank": 2}
    return kvsieve.recipe("momentkv", budget=budget, **(small | options))


def left_over(
    v: Vector, gone: list[tuple[Vector, Vector]], rank: int, kind: str = "subspace"
) -> float:
    """Residual of one value, from the evicted keys and values themselves, by least squares."""
    value = torch.tensor(v, dtype=torch.float64)
    if not gone:
        return 1.0 if kind == "cosine" else float(value.norm())
    keys, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*gone, strict=True))
    mu = values.mean(0)
    if kind == "cosine":
        return 1 - abs(float(value @ mu / value.norm() / mu.norm()))
    C = (values - mu).T @ (keys - keys.mean(0)) / len(gone)
    u, s, _ = torch.linalg.svd(C)
    span = [u[:, j] for j in range(min(rank, len(s))) if s[j] > 1e-5 * s[0]]
    if kind == "centre":
        value = value - mu
    else:
        span.append(mu)
    if not span:
        return float(value.norm())
    U = torch.stack(span, 1)
    return float((value - U @ torch.linalg.pinv(U) @ value).norm())


def evict(
    row: Row,
    h: int,
    slots: list[int],
    gone: list[int],
    budget: int,
    rounds: int = 2,
    rank: int = 2,
    kind: str = "subspace",
) -> None:
    """One event on the positions ``slots`` of a head, whose ``gone`` ones went before."""
    part = Row(
        q=[[[row.q[h][g][i] for i in slots] for g in row.groups]],
        k=[[row.k[h][i] for i in slots]],
        v=[],
        scale=row.scale,
    )
    weight = dict(zip(slots, window_attention(part, 0, W, KERNEL), strict=False))
    safe = {*range(SINKS), *slots[-W:]}
    before = len(slots)
    for done in range(1, rounds + 1):
        pairs = [(row.k[h][i], row.v[h][i]) for i in gone]
        scores = {
            i: weight[i] * left_over(row.v[h][i], pairs, rank, kind) for i in slots if i not in safe
        }
        target = before - (before - budget) * done // rounds
        out = sorted(scores, key=lambda i: (scores[i], -i))[: len(slots) - target]
        slots[:] = [i for i in slots if i not in out]
        gone.extend(out)


@pytest.mark.parametrize("rounds", [1, 2, 5, 50])
@pytest.mark.parametrize("kind", ["subspace", "centre", "cosine"])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_kept_set(rounds: int, kind: str, layout: str) -> None:
    layer = draw(S=24, D=6, padding=(0, 5))
    made = recipe(rounds=rounds, residual=kind, layout=layout)
    got = kept(made, layer)
    for b, row in enumerate(rows(layer)):
        for h in row.heads:
            slots: list[int] = list(range(row.n))
            evict(row, h, slots, [], BUDGET, rounds, kind=kind)
            assert got[b][h] == slots


def test_kept_sets_while_decoding() -> None:
    """The summary of all events so far decides what goes next."""
    layer = draw(B=1, S=26, D=6, seed=1)
    run = Run(recipe(schedule="after-prefill|every:2"), layer.part(0, 16))
    row = rows(layer)[0]
    heads: list[tuple[list[int], list[int]]] = [(list(range(16)), []) for _ in row.heads]
    for h, (slots, gone) in enumerate(heads):
        evict(row, h, slots, gone, BUDGET)
    for t in range(16, 26):
        assert run.kept()[0] == [slots for slots, _ in heads]
        run.feed(layer.part(t, t + 1))
        for h, (slots, gone) in enumerate(heads):
            slots.append(t)
            if (t - 15) % 2 == 0:
                evict(row, h, slots, gone, BUDGET)
    summary = run.store().summary
    assert summary is not None
    assert summary.count[0, :, 0].tolist() == [len(gone) for _, gone in heads]


def test_what_the_summary_explains_goes_first_whatever_its_attention() -> None:
    """Four tokens and the query: 0 and 1 have gone; 2 lies in their span, 3 outside of it."""
    values = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    layer = from_attention([[0.02, 0.03, 0.65, 0.3, 0.0]], values)
    layer.keys[0, 0, 0, 0] = -9e3  # keys that differ, so that C is not zero
    options = {"window": 1, "kernel": 1, "sinks": 0}
    assert kept(recipe(2, rounds=3, **options), layer) == [[[3, 4]]]
    assert kept(recipe(2, rounds=1, **options), layer) == [[[2, 4]]]
    assert kept(kvsieve.recipe("snapkv", budget=2, window=1, kernel=1), layer) == [[[2, 4]]]


@pytest.mark.parametrize("correct", [False, True])
def test_without_residual_it_keeps_what_snapkv_keeps(correct: bool) -> None:
    layer = draw(S=24, padding=(0, 5), seed=2)
    snapkv = kvsieve.recipe("snapkv", budget=BUDGET, window=W, kernel=KERNEL, sinks=SINKS)
    plain = recipe(residual="none", correct=correct)
    assert kept(plain, layer) == kept(snapkv, layer)
    assert (plain.summarise is None) is not correct


def next_output(made: kvsieve.Recipe, layer: Layer) -> torch.Tensor:
    """What the last token of a layer gets when all before it were one prompt."""
    S = layer.keys.shape[2]
    run = Run(made, layer.part(0, S - 1))
    last = layer.part(S - 1, S)
    run.session.begin(1, None, None)
    run.session.append(0, last.keys, last.values)
    return run.session.attend(0, last.queries, last.scale)


def test_correction_brings_the_output_nearer_to_the_full_cache_s() -> None:
    """Over 50 rows whose values are directed by the keys, as first order assumes."""
    layer = draw(B=50, H=1, S=40, D=6, seed=3)
    turn = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
    layer = replace(layer, keys=0.5 * layer.keys, values=layer.keys @ turn + 0.2 * layer.values)
    whole = next_output(kvsieve.recipe("full"), layer)
    error = {}
    for correct in (False, True):
        error[correct] = float((next_output(recipe(correct=correct), layer) - whole).norm())
    assert error[True] < error[False] / 2


def test_summaries_of_stretches_are_finer() -> None:
    layer = draw(B=50, H=1, S=60, D=6, seed=5)
    drift = torch.linspace(-2, 2, 60)[None, None, :, None]
    layer = replace(layer, keys=0.3 * layer.keys + drift, values=layer.values + 3 * drift.sin())
    whole = next_output(kvsieve.recipe("full"), layer)
    error = [
        float((next_output(recipe(summaries=n, residual="none"), layer) - whole).norm())
        for n in (1, 4)
    ]
    assert error[1] < error[0]


def test_compressing_32k_slots_takes_about_as_much_as_the_layer() -> None:
    layer = long_layer(G=2, queries=8, seed=6)
    made_recipe = kvsieve.recipe("momentkv", budget=1000, window=8)
    assert made_recipe.scorer is not None
    step, store = table(layer, made_recipe.scorer)
    store.summarise = made_recipe.summarise
    scores = torch.rand(layer.keys.shape[:3])
    with Allocations([*store.table.tensors(), scores]) as made_here:
        made_recipe.compressor.compress(step, store, scores, torch.full((1, 4), 1000))
    assert store.counts.tolist() == [[1000] * 4]
    # Half of the layer is copied by the first round; blocks are a quarter of a table each.
    assert made_here.peak <= 1.5 * 4 * (layer.keys.numel() + layer.values.numel())


@pytest.mark.parametrize(
    "wrong",
    [{"residual": "angle"}, {"rank": -1}, {"rounds": 0}, {"summaries": 0}, {"kernel": 4}],
    ids=str,
)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)
