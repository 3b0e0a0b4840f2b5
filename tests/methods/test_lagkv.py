"""LagKV: what lies outside the range of the next chunk stays; every chunk keeps the same share."""

from __future__ import annotations

from dataclasses import replace
from statistics import stdev

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.methods.lagkv import LagInformation

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
    rows,
    scores,
    softmax,
    table,
)

SINKS, LAG = 2, 4


def recipe(budget: int, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("lagkv", budget=budget, **({"sinks": SINKS, "lag": LAG} | options))


def spread(chunk: list[Vector], following: list[Vector]) -> Vector:
    ranges = [(min(c), max(c)) for c in zip(*following, strict=True)]
    scaled = [
        [(x - low) / (high - low) for x, (low, high) in zip(token, ranges, strict=True)]
        for token in chunk
    ]
    return softmax([stdev(token) for token in scaled])


def formula(row: Row, h: int, *, cross: bool = False) -> Vector:
    out = [1 + i / row.n for i in range(row.n)]
    for start in range(SINKS, row.n - 2 * LAG + 1, LAG):
        here, there = slice(start, start + LAG), slice(start + LAG, start + 2 * LAG)
        parts = [spread(x[h][here], x[h][there]) for x in (row.k, row.v)]
        info = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
        out[here] = info if cross else [sum(y < x for y in info) / LAG for x in info]
    return out


@pytest.mark.parametrize("cross", [False, True])
def test_score_and_kept_set(cross: bool) -> None:
    layer = draw(S=25, padding=(0, 6))
    want = expected(layer, lambda row, h: formula(row, h, cross=cross))
    made = recipe(14, cross_scoring=cross)
    assert_close(scores(layer, made), want)
    assert kept(made, layer) == [[best(head, 14, [0, 1]) for head in row] for row in want]


def test_hand_example() -> None:
    # Channel ranges of the second chunk are [0, 1] and [0, 2]: scaled, the first chunk's tokens
    # are (0, 1), (1, 1), (0, 3), (2, 2), of deviation .71, 0, 2.12, 0; values say the same.
    keys = torch.tensor([[0, 2], [1, 2], [0, 6], [2, 4], [0, 0], [1, 2], [0.5, 1], [0, 0]])
    keys = keys[None, None].float()
    layer = Layer(queries=keys[:, :, None], keys=keys, values=keys)
    got = scores(layer, recipe(6, sinks=0))[0][0]
    assert got == pytest.approx([0.5, 0.25, 0.75, 0.0, 1.5, 1.625, 1.75, 1.875])
    assert kept(recipe(6, sinks=0), layer) == [[[0, 2, 4, 5, 6, 7]]]


def test_every_chunk_keeps_the_same_share() -> None:
    layer = draw(S=SINKS + 6 * LAG + 1, seed=1)
    layer.keys[:, :, 7] *= 30  # a token that stands out takes nothing from other chunks
    for head in [h for row in kept(recipe(SINKS + 5 * 2 + LAG + 1), layer) for h in row]:
        for start in range(SINKS, SINKS + 5 * LAG, LAG):
            assert sum(start <= i < start + LAG for i in head) == 2
        assert head[:2] == [0, 1] and head[-5:] == list(range(22, 27))


def test_scaling_and_shifting_channels_changes_nothing() -> None:
    layer = draw(S=22, seed=2)
    factors, shift = torch.tensor([0.5, 8.0, 2.0, 4.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    moved = replace(layer, keys=layer.keys * factors + shift, values=layer.values * factors)
    made = recipe(9, cross_scoring=True)
    assert_close(scores(moved, made), scores(layer, made))


def test_too_short_or_too_small_keeps_the_most_recent() -> None:
    layer = draw(B=1, H=1, S=SINKS + 2 * LAG - 1)
    assert kept(recipe(5), layer) == [[[0, 1, 6, 7, 8]]]
    longer = draw(B=1, H=1, S=SINKS + 5 * LAG + 3)
    assert kept(recipe(6), longer) == [[[0, 1, 21, 22, 23, 24]]]


def test_a_channel_that_does_not_vary_counts_as_nothing() -> None:
    layer = draw(B=1, H=1, S=18, seed=3)
    layer.keys[..., 1] = 5.0
    flat = replace(layer, keys=torch.cat([layer.keys[..., :1] * 0, layer.keys], -1))
    got = scores(flat, recipe(9, cross_scoring=True))
    assert all(0 < x < 2 for x in got[0][0])


def test_dead_slots_have_no_part() -> None:
    layer = draw(S=25, padding=(0, 6))
    layer.keys[1, :, :6] = float("nan")
    step, store = table(layer, LagInformation(sinks=SINKS, lag=LAG))
    got = LagInformation(sinks=SINKS, lag=LAG).score(step, store)[1, :, 6:].double().tolist()
    assert_close([got], [expected(layer, formula)[1]])


def test_while_decoding_what_is_left_is_cut_into_chunks_anew() -> None:
    layer = draw(B=1, S=26, seed=4)
    run = Run(recipe(14, interval=6), layer.part(0, 20))
    row, slots = rows(layer)[0], run.kept()[0]
    for t in range(20, 26):
        run.feed(layer.part(t, t + 1))
    want = []
    for h, head in enumerate(slots):
        held = [*head, *range(20, 26)]
        part = Row(
            q=row.q, k=[[row.k[h][i] for i in held]], v=[[row.v[h][i] for i in held]], scale=1
        )
        want.append([held[j] for j in best(formula(part, 0), 14, [0, 1])])
    assert run.kept() == [want]


def test_refuses_chunks_of_one() -> None:
    with pytest.raises(RecipeError, match="2 slots or more"):
        recipe(5, lag=1)
