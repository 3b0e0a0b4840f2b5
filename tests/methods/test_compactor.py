"""Compactor: leverage of keys, plus attention inside chunks times the norm of values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.sketch import key_leverage

from .support import (
    FULL,
    Layer,
    Row,
    Run,
    best,
    dot,
    draw,
    kept,
    mean,
    norm,
    rows,
    scores,
    softmax,
    table,
)

SINKS, RECENT, CHUNK = 2, 3, 5


def recipe(budget: int, **options: Any) -> kvsieve.Recipe:
    small: dict[str, Any] = {"sinks": SINKS, "recent": RECENT, "chunk": CHUNK}
    return kvsieve.recipe("compactor", budget=budget, **(small | options))


def looked_at(row: Row, h: int) -> list[float]:
    """Column sums of attention in each chunk, all of its queries over all of its keys."""
    out = [1.0] * row.n
    for start in range(SINKS, row.n, CHUNK):
        chunk = range(start, min(start + CHUNK, row.n))
        heads = []
        for g in row.groups:
            seen = [softmax([dot(row.q[h][g][t], row.k[h][i]) for i in chunk]) for t in chunk]
            heads.append([sum(a[j] for a in seen) for j in range(len(chunk))])
        for j, i in enumerate(chunk):
            out[i] = mean(x[j] for x in heads)
    return out


def formula(row: Row, lever: torch.Tensor, blend: float) -> list[list[float]]:
    """Scores of the slots between sinks and recent tokens; ``lever [H, n]`` is standardised."""
    middle = range(SINKS, row.n - RECENT)
    pooled = []
    for h in row.heads:
        weight = [a * norm(v) for a, v in zip(looked_at(row, h), row.v[h], strict=True)]
        pooled.append(
            [sum(weight[j] for j in (i - 1, i, i + 1) if j in middle) / 3 for i in middle]
        )
    flat = torch.tensor(pooled, dtype=torch.float64)
    z = (flat - flat.mean()) / flat.std()
    return (blend * lever[:, SINKS : row.n - RECENT] + z).tolist()


def leverages(layer: Layer) -> list[torch.Tensor]:
    """Leverage between sinks and recent tokens, row by row; test_leverage.py checks it."""
    made = recipe(8).scorer
    assert made is not None
    out = []
    for row in range(layer.keys.shape[0]):
        live = (
            torch.arange(layer.keys.shape[2])
            if layer.live is None
            else layer.live[row].nonzero()[:, 0]
        )
        alone = Layer(
            queries=layer.queries[row : row + 1][:, :, :, live],
            keys=layer.keys[row : row + 1][:, :, live],
            values=layer.values[row : row + 1][:, :, live],
            angles=layer.angles,
        )
        step, store = table(alone, made)
        n = len(live)
        inside = ((torch.arange(n) >= SINKS) & (torch.arange(n) < n - RECENT))[None, None]
        out.append(key_leverage(step, store, inside, 48, 0)[0].double())
    return out


@pytest.mark.parametrize("blend", [0.0, 0.35, 2.0])
def test_score_and_kept_set(blend: float) -> None:
    layer = draw(S=21, padding=(0, 4), angles=FULL)
    made = recipe(9, blend=blend)
    want = [formula(row, x, blend) for row, x in zip(rows(layer), leverages(layer), strict=True)]
    for row, heads in zip(scores(layer, made), want, strict=True):
        for got, head in zip(row, heads, strict=True):
            assert got[SINKS:-RECENT] == pytest.approx(head, abs=1e-4)
    stays = []
    for heads in want:
        n = len(heads[0]) + SINKS + RECENT
        safe = {*range(SINKS), *range(n - RECENT, n)}
        whole = [[0.0] * SINKS + head + [0.0] * RECENT for head in heads]
        stays.append([best(head, 9, safe) for head in whole])
    assert kept(made, layer) == stays


@pytest.mark.parametrize("cuts", [(1,), (4, 9), (3, 5, 7, 18), (12,), (2, 19)])
def test_parts_of_a_prompt_give_the_same_column(cuts: tuple[int, ...]) -> None:
    layer = draw(S=21, padding=(0, 4), angles=FULL, seed=1)
    run = Run(recipe(21), layer.part(0, cuts[0]))
    for start, end in zip(cuts, (*cuts[1:], 21), strict=True):
        run.feed(layer.part(start, end))
    column = run.store()["looked_at"].expand(2, 2, -1)
    for b, row in enumerate(rows(layer)):
        got = column[b] if layer.live is None else column[b][:, layer.live[b]]
        for h in row.heads:
            assert got[h].tolist() == pytest.approx(looked_at(row, h), abs=1e-5)


def test_columns_of_a_chunk_add_up_to_its_queries() -> None:
    layer = draw(S=19, angles=FULL, seed=2)
    made = recipe(9).scorer
    assert made is not None
    column = table(layer, made)[1]["looked_at"]
    for start, end in ((2, 7), (7, 12), (12, 17), (17, 19)):
        sums = column[:, :, start:end].sum(-1)
        torch.testing.assert_close(sums, torch.full_like(sums, end - start))


def test_decoded_tokens_have_the_mean_and_later_turns_go_on() -> None:
    layer = draw(S=30, angles=FULL, seed=3)
    run = Run(recipe(12), layer.part(0, 17))
    before = run.store()["looked_at"].clone()
    for t in (17, 18):
        run.feed(layer.part(t, t + 1))
    assert bool((run.store()["looked_at"][..., 12:14] == 1).all())
    assert torch.equal(run.store()["looked_at"][..., :12], before)
    run.feed(layer.part(19, 30))
    assert run.store().counts.tolist() == [[12, 12], [12, 12]]
    assert bool(run.store()["looked_at"].isfinite().all())


def test_dead_slots_have_no_part() -> None:
    layer = draw(S=21, padding=(0, 4), angles=FULL)
    clean = scores(layer, recipe(9))[1]
    for x in (layer.keys, layer.values):
        x[1, :, :4] = float("nan")
    assert scores(layer, recipe(9))[1] == clean


def test_refuses_empty_chunks() -> None:
    with pytest.raises(RecipeError, match="must be 1 or more"):
        recipe(9, chunk=0)
