"""G-KV: the best attention a slot ever had, decayed, minus redundancy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError

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
    pooled,
    rows,
    scores,
    table,
)
from .test_r_kv import importance, redundancy

W = 3


def recipe(budget: int = 7, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe("g-kv", budget=budget, window=W, **options)


def local(row: Row, h: int) -> Vector:
    raw = importance(row, h)
    return [x / max(raw) for x in raw]


def mixed(merged: Vector, row: Row, h: int, share: float, kernel: int = 1) -> Vector:
    repeated = redundancy(row.k[h])[: len(merged)]
    widened = pooled(merged, kernel, max)
    return [
        share * p - (1 - share) * r / max(repeated) for p, r in zip(widened, repeated, strict=True)
    ]


@pytest.mark.parametrize(("share", "kernel"), [(0.5, 1), (0.5, 5), (1.0, 1), (0.0, 1)])
def test_score_without_history(share: float, kernel: int) -> None:
    layer = draw(S=16, D=3, padding=(0, 4))
    got = scores(layer, recipe(importance=share, kernel=kernel))

    def formula(row: Row, h: int) -> Vector:
        return mixed(local(row, h), row, h, share, kernel) + [0.0] * W

    assert_close(got, expected(layer, formula), cut=W)


def test_hand_example_of_the_carried_score() -> None:
    """alpha .8, S_old (.9, .2), F (.3, 1, .5): S is (.72, 1, .5), and tokens 0 and 1 stay."""
    layer = from_attention([[0.15, 0.5, 0.25, 0.1]])
    options = {"budget": 3, "window": 1, "importance": 1.0}
    made = kvsieve.recipe("g-kv", decay=0.8, **options)
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    store["global"] = torch.tensor([[[0.9, 0.2, -1.0, -1.0]]])
    got = made.scorer.score(step, store)[0, 0, :3]
    assert got.tolist() == pytest.approx([0.72, 1.0, 0.5], abs=1e-6)
    assert store["global"][0, 0].tolist() == pytest.approx([0.72, 1.0, 0.5, -1.0], abs=1e-6)
    assert best(got.tolist(), 2) == [0, 1]
    assert kept(made, layer) == [[[1, 2, 3]]]  # without a history


@pytest.mark.parametrize(
    ("smoothing", "want"), [("mean", [0.78, 0.36, 0.5]), ("sum", [1.02, 1.16, 0.5])]
)
def test_hand_example_of_the_other_smoothings(smoothing: str, want: Vector) -> None:
    layer = from_attention([[0.15, 0.5, 0.25, 0.1]])
    made = kvsieve.recipe(
        "g-kv", budget=3, window=1, importance=1.0, decay=0.8, smoothing=smoothing
    )
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    store["global"] = torch.tensor([[[0.9, 0.2, -1.0, -1.0]]])
    assert made.scorer.score(step, store)[0, 0, :3].tolist() == pytest.approx(want, abs=1e-6)


@dataclass
class Head:
    """One KV head under a plain form of the paper's loop."""

    row: Row
    h: int
    decay: float
    budget: int
    smoothing: str = "max"
    slots: list[int] = field(default_factory=list)
    old: dict[int, float] = field(default_factory=dict)

    def compress(self) -> None:
        held, row, h = self.slots, self.row, self.h
        part = Row(
            q=[[[row.q[h][g][i] for i in held] for g in row.groups]],
            k=[[row.k[h][i] for i in held]],
            v=[],
            scale=row.scale,
        )
        fresh = local(part, 0)
        merged = [self.merge(held[j], x) for j, x in enumerate(fresh)]
        window = range(len(held) - W, len(held))
        stay = best(mixed(merged, part, 0, 0.5) + [0.0] * W, self.budget, window)
        self.old = {held[j]: merged[j] for j in stay if j < len(merged)}
        self.slots = [held[j] for j in stay]

    def merge(self, slot: int, fresh: float) -> float:
        if slot not in self.old:
            return fresh
        carried = self.decay * self.old[slot]
        if self.smoothing == "max":
            return max(carried, fresh)
        return carried + fresh * (1 if self.smoothing == "sum" else 1 - self.decay)


@pytest.mark.parametrize("smoothing", ["max", "mean", "sum"])
@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_many_events_with_padding(smoothing: str, decay: float) -> None:
    layer = draw(S=36, D=3, padding=(0, 5), seed=1)
    run = Run(recipe(budget=9, interval=4, decay=decay, smoothing=smoothing), layer.part(0, 16))
    heads = [
        [Head(row, h, decay, 9, smoothing, list(range(length))) for h in row.heads]
        for row, length in zip(rows(layer), (16, 11), strict=True)
    ]
    for row in heads:
        for head in row:
            head.compress()
    for t in range(16, 36):
        run.feed(layer.part(t, t + 1))
        for row, late in zip(heads, (0, 5), strict=True):
            for head in row:
                head.slots.append(t - late)
                if (t - 15) % 4 == 0:
                    head.compress()
        assert run.kept() == [[head.slots for head in row] for row in heads]
    carried = run.store()["global"]
    for b, row in enumerate(heads):
        for h, head in enumerate(row):
            want = [head.old.get(slot, -1.0) for slot in head.slots]
            assert carried[b, h, : len(want)].tolist() == pytest.approx(want, abs=1e-5)


def test_alpha_of_zero_is_a_score_without_history() -> None:
    """alpha 0: max(0, F) = F, so that what was carried can't matter."""
    layer = draw(S=16, D=3, seed=2)
    made = recipe(decay=0.0)
    assert made.scorer is not None
    plain = scores(layer, made)
    step, store = table(layer, made.scorer)
    store["global"] = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(3))
    assert_close(made.scorer.score(step, store).double().tolist(), plain, cut=W)


def test_without_decay_scores_of_slots_that_stay_never_fall() -> None:
    layer = draw(B=1, S=40, D=3, seed=4)
    run = Run(recipe(budget=12, interval=4, decay=1.0, importance=1.0), layer.part(0, 20))
    before: dict[tuple[int, int], float] = {}
    for t in range(20, 40):
        run.feed(layer.part(t, t + 1))
        now = {
            (h, slot): score
            for h, slots in enumerate(run.kept()[0])
            for slot, score in zip(slots, run.store()["global"][0, h].tolist(), strict=True)
            if score >= 0
        }
        assert all(now[key] >= before[key] for key in now.keys() & before.keys())
        before = now


def test_of_two_equal_keys_the_later_is_penalised_less() -> None:
    layer = draw(B=1, H=1, S=12, seed=5)
    layer.keys[0, 0, 6] = layer.keys[0, 0, 2]
    got = scores(layer, recipe(importance=0.0))[0][0]
    assert got[6] > got[2]


def test_left_padding_changes_nothing() -> None:
    padded = draw(S=20, D=3, padding=(0, 6), seed=6)
    alone = replace(padded.part(6, 20), live=None)
    assert kept(recipe(), padded)[1] == kept(recipe(), alone)[1]


@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
@pytest.mark.parametrize("normalise", [False, True])
def test_pooling_and_normalisation(pooling: str, normalise: bool) -> None:
    """Pooled are the scores that count now; those that are carried are not."""
    layer = draw(S=16, D=3, padding=(0, 4), seed=7)
    made = recipe(pooling=pooling, kernel=3, normalise=normalise)
    join = {"avg": mean, "max": max, "none": lambda xs: xs[1]}[pooling]

    def formula(row: Row, h: int) -> Vector:
        fresh, repeated = importance(row, h), redundancy(row.k[h])[: row.n - W]
        if normalise:
            fresh = [x / max(fresh) for x in fresh]
            repeated = [x / max(repeated) for x in repeated]
        widened = pooled(fresh, 3, join)
        return [0.5 * p - 0.5 * r for p, r in zip(widened, repeated, strict=True)] + [0.0] * W

    assert_close(scores(layer, made), expected(layer, formula), cut=W)
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    made.scorer.score(step, store)
    carried = importance(rows(layer)[0], 1)
    wanted = [x / max(carried) for x in carried] if normalise else carried
    assert store["global"][0, 1, :-W].tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_budget_grows_to_a_share_of_what_was_seen() -> None:
    """max(b, floor(ratio n)), row by row, at every event."""
    layer = draw(S=40, D=3, padding=(0, 11), seed=8)
    run = Run(recipe(budget=7, interval=4, ratio=0.3), layer.part(0, 24))
    assert [len(row[0]) for row in run.kept()] == [7, 7]
    for seen in range(25, 41):
        run.feed(layer.part(seen - 1, seen))
        if seen % 4 == 0:
            want = [max(7, int(0.3 * (seen - padding))) for padding in (0, 11)]
            assert [[len(head) for head in row] for row in run.kept()] == [[n] * 2 for n in want]
    assert [len(row[0]) for row in run.kept()] == [12, 8]


def test_ratio_is_for_budgets_in_slots() -> None:
    with pytest.raises(RecipeError, match="slots"):
        kvsieve.recipe("g-kv", budget=0.5, ratio=0.3)
    assert recipe(ratio=0.3).ratio == 0.3


WRONG: list[dict[str, Any]] = [
    {"decay": 1.5},
    {"importance": -0.1},
    {"smoothing": "min"},
    {"pooling": "sum"},
]
WRONG += [{"kernel": 4}, {"ratio": 1.0}, {"ratio": -0.1}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)
