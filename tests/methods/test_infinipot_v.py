"""InfiniPot-V: what is new in time, then what has large values, under a cap on a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.errors import BudgetError, RecipeError

from .allocations import Allocations
from .support import (
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
    pooled,
    rows,
    scores,
    table,
)

P, R, SINKS, C = 3, 2, 1, 14
RECENT = P * R


def recipe(budget: int = C, **options: Any) -> kvsieve.Recipe:
    options = {"frame": P, "frames": R, "sinks": SINKS} | options
    return kvsieve.recipe("infinipot-v", budget=budget, **options)


def redundancy(row: Row, h: int, frame: int = P, frames: int = R) -> Vector:
    """TaR: minus the mean cosine with the keys of the same place in the last frames."""
    out = []
    for i in range(row.n):
        last = range(max(0, row.n - frame * frames), row.n)
        same = [j for j in last if (j - i) % frame == 0]
        out.append(-mean(cosine(row.k[h][i], row.k[h][j]) for j in same) if same else 0.0)
    return out


@pytest.mark.parametrize(("frame", "frames"), [(1, 5), (3, 2), (4, 1)])
def test_score(frame: int, frames: int) -> None:
    layer = draw(S=24, padding=(0, 5), seed=1)
    got = scores(layer, recipe(frame=frame, frames=frames))
    assert_close(got, expected(layer, lambda row, h: redundancy(row, h, frame, frames)))


def selection(row: Row, h: int, budget: int, share: float, kernel: int = 1) -> list[int]:
    """First the protected and the best by TaR, up to the share; then the best by VaN."""
    safe = [*range(SINKS), *range(row.n - RECENT, row.n)]
    first = budget - round((1 - share) * budget)
    chosen = set(safe) | set(best(redundancy(row, h), max(first, len(safe)), safe))
    sizes = [norm(v) for v in row.v[h]]
    smooth = pooled(sizes, kernel)
    return best(smooth, budget, chosen)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_kept_sets(share: float, kernel: int) -> None:
    layer = draw(S=40, padding=(0, 9), seed=2)
    got = kept(recipe(share=share, kernel=kernel), layer)
    want = [[selection(row, h, C, share, kernel) for h in row.heads] for row in rows(layer)]
    assert got == want


def test_a_constant_stream_and_the_one_thing_that_was_new() -> None:
    """All frames are equal but for one patch, once, long ago."""
    layer = draw(B=1, S=SINKS + 12 * P, seed=3)
    frames = layer.keys[:, :, SINKS : SINKS + P].repeat(1, 1, 12, 1)
    layer.keys[:, :, SINKS:] = frames
    strange = SINKS + 4 * P + 1
    layer.keys[:, :, strange] *= -1
    for head in scores(layer, recipe())[0]:
        assert head[strange] == pytest.approx(1, abs=1e-5)
        rest = [x for i, x in enumerate(head) if i not in (strange, *range(SINKS))]
        assert rest == pytest.approx([-1] * len(rest), abs=1e-5)
    layer.values[:, :, strange] = 0  # nothing else would save it
    for head in kept(recipe(share=0.7), layer)[0]:
        assert strange in head
    for head in kept(recipe(share=0.0), layer)[0]:
        assert strange not in head


def test_scale_of_keys_changes_nothing_and_scale_of_values_no_order() -> None:
    layer = draw(S=40, seed=4)
    want = kept(recipe(), layer)
    assert kept(recipe(), replace(layer, keys=layer.keys * 19.0)) == want
    assert kept(recipe(), replace(layer, values=layer.values * 0.03)) == want
    assert kept(recipe(), replace(layer, values=layer.values.flip(2))) != want


def test_a_stream_stays_under_its_cap_and_its_prefix_as_it_is() -> None:
    part, parts = 2 * P, 30
    layer = draw(S=SINKS + part * parts, seed=5)
    run = Run(recipe(), layer.part(0, SINKS + part))
    full = run.session.bytes_peak
    for start in range(SINKS + part, SINKS + part * parts, part):
        end = start + part
        run.feed(layer.part(start, end))
        store, held = run.store(), run.kept()
        assert store.counts.tolist() == [[min(C, end)] * 2] * 2
        full = max(full, run.session.bytes_peak) if end < 40 else full
        for b in range(2):
            for h in range(2):
                assert held[b][h] == sorted(set(held[b][h]))
                assert held[b][h][:SINKS] == [0] and held[b][h][-RECENT:] == [
                    *range(end - RECENT, end)
                ]
                for x, y in ((store.keys, layer.keys), (store.values, layer.values)):
                    assert torch.equal(x[b, h], y[b, h, held[b][h]])
    assert run.session.bytes_peak <= full, "a longer stream takes no more memory"
    old = [i for head in run.kept()[0] for i in head[SINKS:-RECENT] if i < 60]
    assert old, "something of the far past was to stay"


def test_later_parts_are_compared_by_their_true_places() -> None:
    layer = draw(B=1, S=44, seed=6)
    run = Run(recipe(), layer.part(0, 25))
    first = run.kept()[0]
    run.feed(layer.part(25, 44))
    row = rows(layer)[0]
    for h, held in enumerate(first):
        left = [*held, *range(25, 44)]
        tar = redundancy(row, h)
        safe = {0, *range(44 - RECENT, 44)}
        chosen = {left[j] for j in best([tar[i] for i in left], C // 2, map(left.index, safe))}
        sizes = [norm(row.v[h][i]) for i in left]
        want = [left[j] for j in best(sizes, C, map(left.index, chosen | safe))]
        assert run.kept()[0][h] == want


def test_a_trigger_lets_it_fill_up_first() -> None:
    layer, trigger = draw(S=80, seed=7), 24
    run = Run(recipe(trigger=trigger), layer.part(0, 10))
    sizes = []
    for start in range(10, 80, 5):
        run.feed(layer.part(start, start + 5))
        sizes.append(int(run.store().counts.max()))
    assert sizes == [15, 20, 14, 19, 14, 19, 14, 19, 14, 19, 14, 19, 14, 19]


def test_works_beside_the_layer() -> None:
    B, H, S, D = 1, 2, 32768, 64
    layer = draw(B=B, H=H, G=1, S=S, D=D)
    built = recipe(4096, frame=140, frames=8)
    assert built.scorer is not None
    with Allocations([layer.queries, layer.keys, layer.values]) as seen:
        step, store = table(layer, built.scorer)
        before = seen.held
        score = built.scorer.score(step, store)
        assert seen.peak - before < B * H * S * D * 4, "the size of the layer's keys"
        built.compressor.compress(step, store, score, torch.full((B, H), 4096))
        assert seen.peak - before < 2 * B * H * S * D * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 0}, "from 1 on"),
        ({"frames": 0}, "from 1 on"),
        ({"share": 1.5}, "from 0 to 1"),
        ({"kernel": 2}, "must be odd"),
        ({"trigger": 1}, "trigger=1"),
        ({"trigger": -4}, "trigger=-4"),
    ],
)
def test_refuses_what_has_no_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**options)


def test_refuses_frames_that_fill_the_budget() -> None:
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(RECENT + SINKS)
