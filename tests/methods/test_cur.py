"""CurDKV: squared norms of keys and values as shares of their windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.methods.cur import SquaredNorms

from .support import (
    Layer,
    Row,
    Vector,
    assert_close,
    best,
    dot,
    draw,
    expected,
    kept,
    scores,
    table,
)


def recipe(budget: int, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("cur", budget=budget, **({"sinks": 2, "local": 5} | options))


def shares(squares: Vector, local: int) -> Vector:
    local = local or len(squares)
    out = []
    for i, x in enumerate(squares):
        start = i - i % local
        out.append(x / sum(squares[start : start + local]) if local < len(squares) else x)
    return out


def formula(row: Row, h: int, *, local: int = 5, combine: str = "product") -> Vector:
    k = shares([dot(x, x) for x in row.k[h]], local)
    v = shares([dot(x, x) for x in row.v[h]], local)
    both = {
        "product": [a * b for a, b in zip(k, v, strict=True)],
        "average": [(a + b) / 2 for a, b in zip(k, v, strict=True)],
        "key": k,
        "value": v,
    }[combine]
    return [x / sum(both) for x in both]


@pytest.mark.parametrize("combine", ["product", "average", "key", "value"])
@pytest.mark.parametrize("local", [0, 5])
def test_score_and_kept_set(local: int, combine: str) -> None:
    layer = draw(S=17, padding=(0, 4))
    want = expected(layer, lambda row, h: formula(row, h, local=local, combine=combine))
    made = recipe(7, local=local, combine=combine)
    assert_close(scores(layer, made), want)
    assert kept(made, layer) == [[best(head, 7, [0, 1]) for head in row] for row in want]


def test_hand_example() -> None:
    keys = torch.tensor([1.0, 3.0, 2.0, 2.0])[None, None, :, None]
    values = torch.tensor([1.0, 1.0, 3.0, 1.0])[None, None, :, None]
    layer = Layer(queries=keys[:, :, None], keys=keys, values=values)
    # Shares in windows of two: keys .1 .9 .5 .5, values .5 .5 .9 .1; products .05 .45 .45 .05
    got = scores(layer, recipe(2, sinks=0, local=2))[0][0]
    assert got == pytest.approx([0.05, 0.45, 0.45, 0.05])
    assert kept(recipe(2, sinks=0, local=2), layer) == [[[1, 2]]]


def test_scaling_keys_or_values_changes_nothing() -> None:
    layer = draw(S=17, seed=1)
    moved = replace(layer, keys=layer.keys * 40, values=layer.values * 0.01)
    assert_close(scores(moved, recipe(7)), scores(layer, recipe(7)))


def test_dead_slots_have_no_part() -> None:
    layer = draw(S=17, padding=(0, 4))
    layer.keys[1, :, :4] = float("nan")
    step, store = table(layer, SquaredNorms(local=5))
    got = SquaredNorms(local=5).score(step, store)[1, :, 4:].double().tolist()
    assert_close([got], [expected(layer, formula)[1]])


def test_zero_keys_have_no_share() -> None:
    layer = draw(B=1, H=1, S=8)
    got = scores(replace(layer, keys=layer.keys * 0), recipe(4))[0][0]
    assert got == [0.0] * 8


def test_a_wide_sketch_approaches_the_norms_and_repeats() -> None:
    layer = draw(S=17, D=8, seed=2)
    sketched = scores(layer, recipe(7, sketch=20_000))
    plain = scores(layer, recipe(7))
    for row, other in zip(sketched, plain, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a == pytest.approx(b, rel=0.1)
    narrow = scores(layer, recipe(7, sketch=2))
    assert narrow == scores(layer, recipe(7, sketch=2))
    assert narrow != scores(layer, recipe(7, sketch=2, seed=1))
    assert narrow != plain


def test_refuses_unknown_combinations() -> None:
    with pytest.raises(RecipeError, match="possible: product, average, key, value"):
        recipe(7, combine="sum")
    with pytest.raises(RecipeError, match=r"0 \(off\) or more"):
        recipe(7, local=-1)
