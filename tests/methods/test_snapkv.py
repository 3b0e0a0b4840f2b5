"""SnapKV: pooled attention of the last queries."""

from __future__ import annotations

import pytest

import kvsieve
from kvsieve.errors import RecipeError

from .support import (
    Row,
    Vector,
    assert_close,
    best,
    draw,
    expected,
    from_attention,
    kept,
    mean,
    scores,
    window_attention,
)

W = 3


def formula(row: Row, h: int, kernel: int, pooling: str) -> Vector:
    how = max if pooling == "max" else mean
    size = 1 if pooling == "none" else kernel
    return window_attention(row, h, W, size, how) + [0.0] * W


@pytest.mark.parametrize(
    ("kernel", "pooling"), [(5, "avg"), (3, "max"), (7, "max"), (5, "none"), (1, "avg")]
)
def test_score(kernel: int, pooling: str) -> None:
    layer = draw(padding=(0, 3), S=14)
    recipe = kvsieve.recipe("snapkv", budget=6, window=W, kernel=kernel, pooling=pooling)
    want = expected(layer, lambda row, h: formula(row, h, kernel, pooling))
    assert_close(scores(layer, recipe), want, cut=W)


def test_hand_example() -> None:
    layer = from_attention([[0.0, 0.5, 0.1, 0.2, 0.2, 0.0], [0.3, 0.2, 0.1, 0.2, 0.1, 0.1]])
    # Means before the window: .15, .35, .1, .2; pooled by 3: .1667, .2, .2167, .1
    recipe = kvsieve.recipe("snapkv", budget=4, window=2, kernel=3)
    got = scores(layer, recipe)[0][0][:4]
    assert got == pytest.approx([0.5 / 3, 0.6 / 3, 0.65 / 3, 0.3 / 3], abs=1e-6)
    assert kept(recipe, layer) == [[[1, 2, 4, 5]]]
    raw = kvsieve.recipe("snapkv", budget=4, window=2, pooling="none")
    assert kept(raw, layer) == [[[1, 3, 4, 5]]]


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_kept_set_is_the_window_and_the_best_of_each_head(pooling: str) -> None:
    layer = draw(padding=(0, 3), S=14, seed=1)
    recipe = kvsieve.recipe("snapkv", budget=7, window=W, kernel=3, pooling=pooling)
    want = [
        [best(head, 7, range(len(head) - W, len(head))) for head in row]
        for row in expected(layer, lambda row, h: formula(row, h, 3, pooling))
    ]
    assert kept(recipe, layer) == want


def test_a_row_shorter_than_the_window_stays_whole() -> None:
    layer = draw(padding=(0, 10))  # two real tokens in row 1, a window of three
    recipe = kvsieve.recipe("snapkv", budget=6, window=W, kernel=1)
    assert kept(recipe, layer)[1] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("wrong", [{"window": 0}, {"kernel": 4}, {"pooling": "median"}])
def test_refuses_what_has_no_meaning(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        kvsieve.recipe("snapkv", budget=8, **wrong)
