"""Distinct keys: un-rotated keys that point away from their mean direction stay."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import tiny

import kvsieve
from kvsieve.allocators import Uniform
from kvsieve.errors import BudgetError, RecipeError, UnsupportedSignal
from kvsieve.interfaces import Signal
from kvsieve.methods.distinct_keys import DistinctKeys

from .support import (
    FULL,
    PARTIAL,
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
    shared,
    table,
    turned,
)


def recipe(budget: int, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("distinct-keys", budget=budget, **{"recent": 0, **options})


def distinct(keys: list[Vector], positions: list[int], angles: tuple[float, ...]) -> Vector:
    back = [turned(k, -p, angles) for k, p in zip(keys, positions, strict=True)]
    unit = [[x / norm(u) for x in u] for u in back]
    anchor = [mean(column) for column in zip(*unit, strict=True)]
    return [-cosine(u, anchor) for u in back]


def smoothed(xs: Vector, kernel: int) -> Vector:
    reach = kernel // 2
    return [mean(xs[max(0, i - reach) : i + reach + 1]) for i in range(len(xs))]


def standard(xs: Vector) -> Vector:
    centre = mean(xs)
    deviation = math.sqrt(mean((x - centre) ** 2 for x in xs))
    return [(x - centre) / deviation for x in xs]


def ranks(xs: Vector) -> Vector:
    order = sorted(range(len(xs)), key=lambda i: (-xs[i], i))
    return [(len(xs) - order.index(i)) / len(xs) for i in range(len(xs))]


def formula(row: Row, h: int, angles: tuple[float, ...], kernel: int = 1) -> Vector:
    return smoothed(distinct(row.k[h], list(range(row.n)), angles), kernel)


@pytest.mark.parametrize("angles", [FULL, PARTIAL], ids=["full", "partial"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_score(kernel: int, angles: tuple[float, ...]) -> None:
    layer = draw(padding=(0, 3), angles=angles)
    want = expected(layer, lambda row, h: formula(row, h, angles, kernel))
    assert min(x for row in want for head in row for x in head) < 0
    assert_close(scores(layer, recipe(5, kernel=kernel)), want)


@pytest.mark.parametrize("kernel", [1, 3])
def test_kept_set(kernel: int) -> None:
    layer = draw(S=16, padding=(0, 3), angles=FULL, seed=1)
    want = expected(layer, lambda row, h: formula(row, h, FULL, kernel))
    stays = [[best(h, 6, range(len(h) - 2, len(h))) for h in row] for row in want]
    assert kept(recipe(6, kernel=kernel, recent=2), layer) == stays


@pytest.mark.parametrize("floor", [0.2, 0.5])
def test_heads_share_by_standardised_scores(floor: float) -> None:
    layer = draw(H=3, S=20, padding=(0, 2), angles=FULL, seed=2)
    layer.keys[:, 0, ::2] += 5.0  # one head whose keys come in two bundles
    want = expected(layer, lambda row, h: standard(formula(row, h, FULL)))
    made = recipe(8, adaptive=True, floor=floor, recent=2)
    assert_close(scores(layer, made), want)
    stays = [shared(row, 8, floor, window=2) for row in want]
    assert len({len(head) for head in stays[0]}) > 1
    assert kept(made, layer) == stays


def test_equal_keys_are_counted_to_the_slot() -> None:
    layer = draw(B=1, H=2, S=12, angles=(0.0, 0.0))
    layer.keys[:] = torch.tensor([0.3, -2.0, 0.5, 1.0])
    got = torch.tensor(scores(layer, recipe(4, adaptive=True)))
    assert float(got.abs().max()) < 1.0  # rounding is not blown up
    assert sum(len(head) for head in kept(recipe(4, adaptive=True), layer)[0]) == 8


def test_the_same_content_scores_alike_wherever_it_stands() -> None:
    """Contents in another order, each rotated to its new place: scores move along."""
    contents = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))

    def placed(vectors: torch.Tensor) -> Layer:
        keys = [turned(x, i, FULL) for i, x in enumerate(vectors.double().tolist())]
        made = torch.tensor(keys, dtype=torch.float32)[None, None]
        return Layer(queries=made[:, :, None], keys=made, values=made, angles=FULL)

    before = scores(placed(contents), recipe(5))[0][0]
    after = scores(placed(contents[order]), recipe(5))[0][0]
    assert after == pytest.approx([before[i] for i in order.tolist()], abs=1e-5)
    plain = kvsieve.recipe("keydiff", budget=5)
    differing = scores(placed(contents[order]), plain)[0][0]
    unmoved = scores(placed(contents), plain)[0][0]
    assert differing != pytest.approx([unmoved[i] for i in order.tolist()], abs=1e-2)


def test_without_rotation_it_is_keydiff() -> None:
    layer = draw(S=14, padding=(0, 4), angles=(0.0, 0.0), seed=5)
    assert_close(scores(layer, recipe(5)), scores(layer, kvsieve.recipe("keydiff", budget=5)))


class Head:
    """One KV head, simulated slot by slot."""

    def __init__(self, row: Row, h: int, kernel: int, history: float) -> None:
        self.row, self.h, self.kernel, self.history = row, h, kernel, history
        self.slots: list[int] = []
        self.received: dict[int, float] = {}

    def see(self, t: int) -> None:
        row, h = self.row, self.h
        self.slots.append(t)
        for g in row.groups:
            weights = row.attention_to(self.slots, h, g, t)
            for i, weight in zip(self.slots, weights, strict=True):
                self.received[i] = self.received.get(i, 0.0) + weight / len(row.groups)

    def drop(self, budget: int, recent: int, decoding: bool) -> None:
        keys = [self.row.k[self.h][i] for i in self.slots]
        score = smoothed(distinct(keys, self.slots, FULL), self.kernel)
        if decoding and self.history:
            attention = ranks([self.received[i] for i in self.slots])
            score = [a + self.history * b for a, b in zip(ranks(score), attention, strict=True)]
        n = len(score)
        self.slots = [self.slots[j] for j in best(score, budget, range(n - recent, n))]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("history", [0.0, 0.7])
def test_while_decoding(history: float, kernel: int) -> None:
    """Slots keep their positions; from the first event on, ranks of attention are added."""
    layer = draw(B=1, S=34, angles=FULL, seed=6)
    budget, recent, interval = 9, 3, 4
    options = {"recent": recent, "interval": interval, "kernel": kernel, "history": history}
    run = Run(recipe(budget, **options), layer.part(0, 18))
    heads = [Head(rows(layer)[0], h, kernel, history) for h in range(2)]
    for head in heads:
        for t in range(18):
            head.see(t)
        head.drop(budget, recent, decoding=False)
    assert run.kept() == [[head.slots for head in heads]]
    for t in range(18, 34):
        run.feed(layer.part(t, t + 1))
        for head in heads:
            head.see(t)
            if (t - 17) % interval == 0:
                head.drop(budget, recent, decoding=True)
        assert run.kept() == [[head.slots for head in heads]]


def test_history_matters_while_decoding_alone() -> None:
    layer = draw(B=1, S=30, angles=FULL, seed=7)
    runs = [
        Run(recipe(8, interval=6, history=history), layer.part(0, 24)) for history in (0.0, 5.0)
    ]
    assert runs[0].kept() == runs[1].kept()
    for t in range(24, 30):
        for run in runs:
            run.feed(layer.part(t, t + 1))
    assert runs[0].kept() != runs[1].kept()


def test_defaults() -> None:
    made = kvsieve.recipe("distinct-keys", budget=64)
    assert str(made.schedule) == "after-prefill|every:16"
    assert made.recent == 16 and made.layout == "dense" and made.allocator == Uniform()
    assert made.needs == {Signal.PRE_ROPE} and made.scorer is not None
    assert made.scorer.columns == ()
    with pytest.raises(BudgetError, match="16 recent tokens"):
        kvsieve.recipe("distinct-keys", budget=16)
    made = kvsieve.recipe("distinct-keys", budget=64, history=1.0)
    assert made.needs == {Signal.PRE_ROPE, Signal.ATTENTION_SUMS}


def test_scores_take_blocks_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw(S=23, padding=(0, 4), angles=FULL, seed=8)
    want = scores(layer, recipe(5))
    seen: list[tuple[int, ...]] = []
    step, store = table(layer, DistinctKeys())
    rotary = step.layer.rotary
    assert rotary is not None

    def watched(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(positions.shape))
        return rotary(positions)

    monkeypatch.setattr("kvsieve.keys.layer_block", lambda keys: 5 * 2 * 2 * 4)
    step = dataclasses.replace(step, layer=dataclasses.replace(step.layer, rotary=watched))
    got = DistinctKeys().score(step, store)
    assert [shape[-1] for shape in seen] == [5, 5, 5, 5, 3]
    for b in range(2):
        live = slice(0 if b == 0 else 4, None)
        assert_close([got[b, :, live].double().tolist()], [want[b]])


@pytest.mark.parametrize(
    "wrong", [{"kernel": 2}, {"kernel": 0}, {"history": -0.1}, {"history": math.inf}]
)
def test_refuses_what_has_no_meaning(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        recipe(8, **wrong)


def test_models_whose_keys_cannot_be_turned_back_are_refused() -> None:
    with pytest.raises(UnsupportedSignal, match="distinct-keys"):
        kvsieve.attach(tiny("deepseek-v3"), kvsieve.recipe("distinct-keys", budget=64))
