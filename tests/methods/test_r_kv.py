"""R-KV: pooled attention of the last queries minus redundancy among keys."""

from __future__ import annotations

import sys

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
    cosine,
    draw,
    expected,
    kept,
    mean,
    pooled,
    rows,
    scores,
    softmax,
)

W = 3


def redundancy(keys: list[Vector], threshold: float = 0.5) -> Vector:
    """The paper's dense definition: the whole matrix, the latest near-duplicate forgiven."""
    n = len(keys)
    cos = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(n)] for i in range(n)]
    for j in range(n):
        near = [i for i in range(n) if cos[i][j] > threshold]
        if near:
            cos[near[-1]][j] = 0.0
    return softmax([sum(cos[i]) / n for i in range(n)])


def importance(row: Row, h: int) -> Vector:
    """Mean over the window of the group's maximum, for the slots before the window."""
    seen = [
        [max(head) for head in zip(*(row.attention(h, g, t) for g in row.groups), strict=True)]
        for t in range(row.n - W, row.n)
    ]
    return [mean(a[i] for a in seen) for i in range(row.n - W)]


def formula(row: Row, h: int, kernel: int = 5, share: float = 0.1) -> Vector:
    local = importance(row, h)
    repeated = redundancy(row.k[h])
    widened = pooled(local, kernel, max)
    z = [share * p - (1 - share) * r for p, r in zip(widened, repeated, strict=False)]
    return z + [0.0] * W


def recipe(budget: int = 7, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("r-kv", budget=budget, window=W, **options)


@pytest.mark.parametrize(("kernel", "share"), [(5, 0.1), (1, 0.1), (7, 0.8), (5, 0.0), (3, 1.0)])
def test_score(kernel: int, share: float) -> None:
    layer = draw(S=16, D=3, padding=(0, 4))
    got = scores(layer, recipe(kernel=kernel, importance=share))
    assert_close(got, expected(layer, lambda row, h: formula(row, h, kernel, share)), cut=W)


def test_kept_set() -> None:
    layer = draw(S=16, D=3, padding=(0, 4), seed=1)
    want = [
        [best(head, 7, range(len(head) - W, len(head))) for head in row]
        for row in expected(layer, formula)
    ]
    assert kept(recipe(), layer) == want


def test_of_two_equal_keys_the_later_is_less_redundant() -> None:
    layer = draw(B=1, H=1, S=12, seed=2)
    layer.keys[0, 0, 6] = layer.keys[0, 0, 2]
    got = scores(layer, recipe(importance=0.0))[0][0]
    assert got[6] > got[2]


def test_tiles_equal_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw(S=16, D=3, padding=(0, 4), seed=3)
    whole = scores(layer, recipe())
    tiling = sys.modules["kvsieve.store.attend"]
    monkeypatch.setattr(tiling, "BLOCK_ELEMENTS", 16 * 2 * 2 * 3)  # three columns at a time
    assert_close(scores(layer, recipe()), whole)


def test_compresses_at_intervals_while_decoding() -> None:
    layer = draw(B=1, S=24, D=3, seed=4)
    run = Run(recipe(budget=8, interval=5), layer.part(0, 12))
    row = rows(layer)[0]
    slots = [list(range(12)) for _ in row.heads]

    def compress(now: int) -> None:
        for h in row.heads:
            held = slots[h]
            queries = [row.q[h][g] for g in row.groups]
            part = Row(
                q=[[[q[i] for i in held] for q in queries]],
                k=[[row.k[h][i] for i in held]],
                v=[],
                scale=row.scale,
            )
            window = range(len(held) - W, len(held))
            assert held[-W:] == list(range(now - W, now))
            slots[h] = [held[j] for j in best(formula(part, 0), 8, window)]

    compress(12)
    assert run.kept() == [slots]
    for t in range(12, 24):
        run.feed(layer.part(t, t + 1))
        for held in slots:
            held.append(t)
        if (t - 11) % 5 == 0:
            compress(t + 1)
        assert run.kept() == [slots]


def test_zero_keys_are_finite() -> None:
    layer = draw(B=1, H=1, S=10)
    quiet = Layer(queries=layer.queries, keys=torch.zeros_like(layer.keys), values=layer.values)
    assert kept(recipe(), quiet) == [[[0, 1, 2, 3, 7, 8, 9]]]
