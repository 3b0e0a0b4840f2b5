"""KeyDiff: keys that point away from the mean direction stay."""

from __future__ import annotations

import pytest
import torch
from models import prompt, tiny
from running import decode

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.methods.keydiff import KeyDiff

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
    norm,
    rows,
    scores,
    table,
)


def recipe(budget: int) -> kvsieve.Recipe:
    return kvsieve.recipe("keydiff", budget=budget)


def of_keys(keys: torch.Tensor) -> Layer:
    """Make one head of ``keys [S, D]``."""
    keys = keys[None, None].float()
    return Layer(queries=torch.zeros_like(keys)[:, :, None], keys=keys, values=keys)


def formula(row: Row, h: int) -> Vector:
    unit = [[x / norm(k) for x in k] for k in row.k[h]]
    anchor = [mean(column) for column in zip(*unit, strict=True)]
    return [-cosine(k, anchor) for k in row.k[h]]


def test_score_and_kept_set() -> None:
    layer = draw(padding=(0, 3))
    want = expected(layer, formula)
    assert_close(scores(layer, recipe(5)), want)
    assert kept(recipe(5), layer) == [[best(head, 5) for head in row] for row in want]


def test_hand_example() -> None:
    layer = of_keys(torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    got = scores(layer, recipe(1))[0][0]
    assert got == pytest.approx([-0.7071, -0.7071, -0.7071, 0.7071], abs=1e-4)
    assert kept(recipe(1), layer) == [[[3]]]


def test_order_is_that_of_total_cosine_similarity() -> None:
    layer = draw(B=1, H=1, S=40, seed=1)
    row = rows(layer)[0]
    total = [sum(cosine(k, other) for other in row.k[0]) for k in row.k[0]]
    unit = [[x / norm(k) for x in k] for k in row.k[0]]
    length = norm([mean(column) for column in zip(*unit, strict=True)])
    got = scores(layer, recipe(5))[0][0]
    assert got == pytest.approx([-x / (40 * length) for x in total], abs=1e-5)


def test_scaling_keys_and_turning_all_of_them_change_nothing() -> None:
    layer = draw(seed=2)
    want = scores(layer, recipe(5))
    made = torch.Generator().manual_seed(3)
    factors = torch.rand(2, 2, 12, 1, generator=made) * 9 + 0.1
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=made))[0]
    for keys in (layer.keys * factors, layer.keys @ rotation):
        assert_close(scores(Layer(queries=layer.queries, keys=keys, values=keys), recipe(5)), want)


def test_permuting_tokens_permutes_the_kept_set() -> None:
    layer = draw(B=1, H=1, seed=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    moved = of_keys(layer.keys[0, 0][order])
    before = kept(recipe(5), layer)[0][0]
    assert sorted(order[kept(recipe(5), moved)[0][0]].tolist()) == before


def test_equal_keys_tie_and_the_count_is_exact() -> None:
    layer = of_keys(torch.tensor([[0.3, -2.0, 0.5]]).expand(9, 3))
    assert scores(layer, recipe(4))[0][0] == pytest.approx([-1.0] * 9, abs=1e-6)
    assert kept(recipe(4), layer) == [[[0, 1, 2, 3]]]


def test_the_odd_one_out_scores_highest() -> None:
    near = torch.tensor([[1.0, 0.01, 0], [1.0, 0, 0.02], [1.0, -0.01, 0], [1.0, 0, -0.01]])
    layer = of_keys(torch.cat([near, torch.tensor([[0.0, 0.0, 1.0]])]))
    got = scores(layer, recipe(1))[0][0]
    assert max(got[:4]) < got[4]


def test_blocks_of_the_prompt_follow_the_paper_s_loop() -> None:
    """Cache plus block, then the best N of both, with the anchor made anew."""
    layer = draw(B=1, S=30, seed=6)
    row = rows(layer)[0]
    run = Run(recipe(7), layer.part(0, 5))
    slots = [list(range(5)) for _ in row.heads]
    for start in range(5, 30, 5):
        end = start + 5
        run.feed(layer.part(start, end))
        for h in row.heads:
            slots[h] += range(start, end)
            held = Row(q=row.q, k=[[row.k[h][i] for i in slots[h]]], v=row.v, scale=1.0)
            slots[h] = [slots[h][j] for j in best(formula(held, 0), 7)]
        assert run.kept() == [slots]
    assert slots != kept(recipe(7), layer)[0]  # the anchor moves: blocks are not one shot


def test_dead_slots_do_not_move_the_anchor() -> None:
    layer = draw(padding=(0, 3))
    layer.keys[1, :, :3] = 1e6
    step, store = table(layer, KeyDiff())
    got = KeyDiff().score(step, store)[1, :, 3:].double().tolist()
    assert_close([got], [expected(layer, formula)[1]])


def test_kept_set_is_that_of_all_pairs() -> None:
    """The anchor and the brute-force sums over all pairs of keys keep the same slots."""
    layer = draw(B=2, S=90, padding=(0, 11), seed=7)

    def pairs(row: Row, h: int) -> Vector:
        return [-sum(cosine(k, other) for other in row.k[h]) for k in row.k[h]]

    want = [[best(head, 30) for head in row] for row in expected(layer, pairs)]
    assert kept(recipe(30), layer) == want


def test_an_anchor_of_keys_as_long_as_they_are() -> None:
    layer = of_keys(torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    made = kvsieve.recipe("keydiff", budget=1, anchor="mean")
    got = scores(layer, made)[0][0]
    assert got == pytest.approx([-0.9950, -0.9950, -0.0995, 0.9950], abs=1e-4)

    def plain(row: Row, h: int) -> Vector:
        anchor = [mean(column) for column in zip(*row.k[h], strict=True)]
        return [-cosine(k, anchor) for k in row.k[h]]

    layer = draw(padding=(0, 3), seed=8)
    assert_close(scores(layer, made), expected(layer, plain))
    assert scores(layer, made)[0][0] != pytest.approx(scores(layer, recipe(1))[0][0], abs=1e-3)
    with pytest.raises(RecipeError, match="possible: unit, mean"):
        kvsieve.recipe("keydiff", budget=1, anchor="median")


@pytest.mark.parametrize("schedule", ["after-prefill|every:128", "above:40"])
def test_blocks_of_128_bound_memory_however_long_the_prompt(schedule: str) -> None:
    """Every head is back at N after each block, so that N + 128 slots are the most there are."""
    N, P, model = 40, 128, tiny("llama")
    made = kvsieve.recipe("keydiff", budget=N, schedule=schedule)
    peaks = []
    for blocks in (4, 12):
        trace = decode(model, made, prompt(blocks * P), steps=0, chunks=(P,) * blocks)
        assert [int(count.max()) for count in trace.counts] == [N] * blocks
        assert [int(count.min()) for count in trace.counts] == [N] * blocks
        peaks.append(trace.report.bytes_peak)
    assert peaks[0] == peaks[1], "the peak does not depend on the prompt's length"
    # 2 layers of 2 heads: fp32 keys and values of 16, a position. Tables have room for a 16th or
    # 32 slots more; while one layer is compacted, the old table and the new one exist.
    slot = 2 * (2 * 16 * 4 + 4)
    assert peaks[1] <= slot * ((N + 32) + 2 * (N + P + 32))
    whole = decode(model, made, prompt(12 * P), steps=0)
    assert peaks[1] < whole.report.bytes_peak / 4


def test_a_score_of_the_key_alone_does_not_depend_on_blocks() -> None:
    """The loop of blocks is a streaming top-k; what depends on blocks is KeyDiff's anchor."""
    layer = draw(B=1, S=30, seed=9)
    by_norm = kvsieve.recipe("knorm", budget=7)
    for size in (3, 10):
        run = Run(by_norm, layer.part(0, size))
        for start in range(size, 30, size):
            run.feed(layer.part(start, start + size))
        assert run.kept() == kept(by_norm, layer)
