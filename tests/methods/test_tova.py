"""TOVA: what the last query attends to, one set of tokens for all heads of a layer."""

from __future__ import annotations

import kvsieve

from .support import (
    Row,
    Run,
    Vector,
    assert_close,
    best,
    draw,
    expected,
    from_attention,
    kept,
    mean,
    rows,
    scores,
)


def formula(row: Row, h: int) -> Vector:
    last = [row.attention(j, g, row.n - 1) for j in row.heads for g in row.groups]
    return [mean(weights[i] for weights in last) for i in range(row.n)]


def test_score_is_the_last_query_s_attention_over_all_heads() -> None:
    layer = draw(padding=(0, 3))
    got = scores(layer, kvsieve.recipe("tova", budget=4))
    assert_close(got, expected(layer, formula))
    assert all(row[0] == row[1] for row in got)


def test_hand_example() -> None:
    layer = from_attention([[0.4, 0.1, 0.3, 0.2]])
    assert kept(kvsieve.recipe("tova", budget=3), layer) == [[[0, 2, 3]]]
    assert kept(kvsieve.recipe("tova", budget=2), layer) == [[[0, 3]]]  # the last one stays


def test_kept_set_is_the_same_in_every_head() -> None:
    layer = draw(padding=(0, 3), seed=1)
    want = [[best(head, 5, [len(head) - 1]) for head in row] for row in expected(layer, formula)]
    assert kept(kvsieve.recipe("tova", budget=5), layer) == want


def test_equals_snapkv_of_one_query_averaged_over_heads() -> None:
    layer = draw(padding=(0, 3), seed=2)
    snap = scores(layer, kvsieve.recipe("snapkv", budget=5, window=1, kernel=1))
    heads = [[[mean(x) for x in zip(*row, strict=True)]] * 2 for row in snap]
    assert_close(scores(layer, kvsieve.recipe("tova", budget=5)), heads)


def test_drops_the_least_attended_at_each_decode_step() -> None:
    layer = draw(B=1, S=20, seed=3)
    run = Run(kvsieve.recipe("tova", budget=6), layer.part(0, 6))
    row = rows(layer)[0]
    slots = list(range(6))
    for t in range(6, 20):
        run.feed(layer.part(t, t + 1))
        slots.append(t)
        heads = [row.attention_to(slots, h, g, t) for h in row.heads for g in row.groups]
        received = [mean(weights[j] for weights in heads) for j in range(len(slots))]
        slots.pop(received.index(min(received[:-1])))
        assert run.kept() == [[slots, slots]]
