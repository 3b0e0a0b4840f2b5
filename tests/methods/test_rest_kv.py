"""ReST-KV: change of the output without a token, smoothed over queries and moving slots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.allocators import Pyramid
from kvsieve.errors import RecipeError
from kvsieve.smoothing import moving_mean

from .allocations import Allocations
from .support import (
    Layer,
    Row,
    Run,
    Vector,
    assert_close,
    best,
    draw,
    expected,
    from_attention,
    kept,
    long_layer,
    mean,
    norm,
    project,
    rows,
    scores,
    table,
)

W = 4
BUDGET = 9


def recipe(budget: int = BUDGET, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe("rest-kv", budget=budget, **{"window": W, "kernel": 3, **options})


def lost(weights: Vector, values: list[Vector], power: float = 1.0) -> Vector:
    output = [sum(a * v[d] for a, v in zip(weights, values, strict=True)) for d in range(6)]
    gaps = [norm([x - y for x, y in zip(output, v, strict=True)]) for v in values]
    return [a / (1 - a) * gap**power for a, gap in zip(weights, gaps, strict=True)]


def running(series: list[Vector], alpha: float) -> Vector:
    state = series[0]
    for x in series[1:]:
        state = [alpha * new + (1 - alpha) * old for new, old in zip(x, state, strict=True)]
    return state


def drift(seen: list[Vector], count: int) -> float:
    def place(weights: Vector) -> float:
        return mean(sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:count])

    half = len(seen) // 2
    return mean(place(a) for a in seen[:half]) - mean(place(a) for a in seen[half:])


def smoothed(xs: Vector, delta: float, beta: float, kernel: int) -> Vector:
    k = max(kernel, 2 * math.floor(abs(delta) / beta) + 1)
    s = math.trunc(delta / beta)
    last = len(xs) - 1
    return [
        mean(xs[min(max(j, 0), last)] for j in range(n + s - k // 2, n + s + k // 2 + 1))
        for n in range(len(xs))
    ]


def formula(
    layer: Layer,
    row: Row,
    h: int,
    *,
    alpha: float = 0.3,
    beta: float = 2000.0,
    kernel: int = 3,
    form: str = "code",
    gqa: str = "mean",
) -> Vector:
    """Scores of the slots before the window, then zeros."""
    assert layer.w_o is not None
    past, heads = row.n - W, []
    for g in row.groups:
        values = [project(v, layer.w_o[h, g].double().tolist()) for v in row.v[h]]
        seen = [row.attention(h, g, t) for t in range(past, row.n)]
        if form == "code":
            one = lost(running(seen, alpha)[:past], values[:past])
        else:
            one = running([lost(a, values)[:past] for a in seen], alpha)
        heads.append(smoothed(one, drift(seen, BUDGET - W), beta, kernel))
    join = max if gqa == "max" else mean
    return [join(xs) for xs in zip(*heads, strict=True)] + [0.0] * W


OPTIONS: list[dict[str, Any]] = [
    {},
    {"form": "paper"},
    {"gqa": "max", "kernel": 1},
    {"alpha": 1.0, "kernel": 5},
    {"beta": 0.37},
    {"beta": 1.3, "form": "paper", "gqa": "max"},
    {"beta": 0.13, "kernel": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_score(options: dict[str, Any]) -> None:
    layer = draw(S=22, padding=(0, 5))
    want = expected(layer, lambda row, h: formula(layer, row, h, **options))
    assert_close(scores(layer, recipe(**options)), want, cut=W)


@pytest.mark.parametrize("beta", [2000.0, 0.37])
def test_kept_set(beta: float) -> None:
    layer = draw(S=22, padding=(0, 5), seed=1)
    want = [
        [best(head, BUDGET, range(len(head) - W, len(head))) for head in row]
        for row in expected(layer, lambda row, h: formula(layer, row, h, beta=beta))
    ]
    assert kept(recipe(beta=beta), layer) == want


def test_drawn_layers_do_drift_both_ways() -> None:
    """What the tests above take for granted."""
    layer = draw(S=22, padding=(0, 5))
    found = [
        drift([row.attention(h, g, t) for t in range(row.n - W, row.n)], BUDGET - W)
        for row in rows(layer)
        for h in row.heads
        for g in row.groups
    ]
    assert min(found) < -0.37 and max(found) > 0.37


def test_is_how_far_the_output_moves_without_the_token() -> None:
    layer = draw(B=1, H=1, G=1, S=14, seed=2)
    row = rows(layer)[0]
    assert layer.w_o is not None
    weights = torch.tensor(row.attention(0, 0, 13), dtype=torch.float64)
    projected = torch.tensor(row.v[0], dtype=torch.float64) @ layer.w_o[0, 0].double()
    moved = []
    for n in range(14):
        without = weights.clone()
        without[n] = 0
        output = (without / without.sum()) @ projected
        moved.append(float((weights @ projected - output).norm()))
    got = scores(layer, recipe(window=1, kernel=1, form="paper"))
    assert_close(got, [[moved]], cut=1)


def hand_layer(*weights: Vector) -> Layer:
    values = [[float(i + 1)] for i in range(len(weights[0]))]
    return replace(from_attention(weights, values), w_o=torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_hand_example(form: str) -> None:
    """Token 2 has the second largest weight, but its value is what comes out anyway."""
    layer = hand_layer([0.1, 0.2, 0.3, 0.4, 0.0])
    made = recipe(4, window=1, kernel=1, form=form)
    got = scores(layer, made)[0][0][:4]
    assert got == pytest.approx([0.2222, 0.25, 0.0, 0.6667], abs=1e-4)
    assert kept(made, layer) == [[[0, 1, 3, 4]]]
    assert kept(kvsieve.recipe("snapkv", budget=4, window=1, kernel=1), layer) == [[[1, 2, 3, 4]]]


def test_attention_that_stays_the_same_needs_no_average() -> None:
    layer = hand_layer([0.1, 0.2, 0.3, 0.4, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0, 0.0])
    for form in ("code", "paper"):
        for alpha in (0.1, 0.5, 1.0):
            got = scores(layer, recipe(5, window=2, kernel=1, alpha=alpha, form=form))[0][0][:4]
            assert got == pytest.approx([0.2222, 0.25, 0.0, 0.6667], abs=1e-4)


def test_equal_values_order_by_attention() -> None:
    """The output of the slots before the window is short of the value by the window's mass."""
    layer = draw(G=1, S=16, seed=12)
    layer = replace(layer, values=layer.values[:, :, :1].expand_as(layer.values).contiguous())
    got = scores(layer, recipe(6, window=1, kernel=1))
    for row, score in zip(rows(layer), got, strict=True):
        for h in row.heads:
            order = sorted(range(15), key=lambda i: score[h][i])
            assert order == sorted(range(15), key=lambda i: row.attention(h, 0, 15)[i])


def test_without_motion_it_is_average_pooling_that_repeats_the_ends() -> None:
    layer = draw(B=1, H=1, G=1, S=16, seed=13)
    plain, pooled = (scores(layer, recipe(kernel=k))[0][0][:-W] for k in (1, 5))
    assert pooled == pytest.approx(smoothed(plain, 0.0, 1.0, 5), abs=1e-6)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_blocks_change_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw(S=22, padding=(0, 5), seed=14)
    want, cut = scores(layer, recipe(form=form, beta=0.37)), []

    def small(table: torch.Tensor) -> int:
        cut.append(table.numel())
        return 3 * 2 * 2 * 22  # one query, or a few slots, at a time

    monkeypatch.setattr("kvsieve.methods.rest_kv.layer_block", small)
    monkeypatch.setattr("kvsieve.reconstruction.layer_block", small)
    assert_close(scores(layer, recipe(form=form, beta=0.37)), want, cut=W)
    assert len(cut) >= 3


@pytest.mark.parametrize("form", ["code", "paper"])
def test_scoring_32k_slots_takes_about_as_much_as_the_layer(form: str) -> None:
    """Whole, the window's attention alone would be as large as the layer's keys and values."""
    layer = long_layer(G=4, queries=32, seed=16)
    scorer = kvsieve.recipe("rest-kv", budget=1000, form=form).scorer
    assert scorer is not None
    step, store = table(layer, scorer)
    # The prompt's other queries are gone; positions of the 32 that are left are the last ones.
    step = replace(step, positions=step.positions[:, -32:], budgets=torch.tensor([1000]))
    with Allocations([*store.table.tensors(), layer.queries]) as made_here:
        score = scorer.score(step, store)
    assert score.shape == layer.keys.shape[:3]
    assert made_here.peak <= 4 * (layer.keys.numel() + layer.values.numel())


def test_turning_the_output_changes_nothing() -> None:
    layer = draw(S=16, seed=3)
    assert layer.w_o is not None
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(4)))[0]
    turned = replace(layer, w_o=layer.w_o @ rotation)
    assert_close(scores(turned, recipe()), scores(layer, recipe()), cut=W)


def test_without_values_it_ranks_by_attention() -> None:
    layer = draw(G=1, S=16, seed=5)
    plain = recipe(6, window=1, kernel=1, projected=False, power=0.0)
    want = kept(kvsieve.recipe("snapkv", budget=6, window=1, kernel=1), layer)
    assert kept(plain, replace(layer, w_o=None)) == want


def test_motion_to_earlier_slots_goes_on() -> None:
    """The first queries look at slots 12 and 13, the last at 8 and 9: slots 4 and 5 are next."""
    late, early = ([0.5 * (i in at) for i in range(24)] for at in ((12, 13), (8, 9)))
    layer = hand_layer(late, late, early, early)
    got = scores(layer, recipe(W + 2, beta=1.0, kernel=1, projected=False, power=0.0))[0][0][:20]
    # Delta 4: nine slots, four further on; E has .51 of 12 and 13's weight (.7 * .7 + 0).
    a, b = 0.5 * 0.49, 0.5 * 0.51
    want = smoothed(
        [(a / (1 - a)) * (i in (12, 13)) + (b / (1 - b)) * (i in (8, 9)) for i in range(20)],
        4.0,
        1.0,
        1,
    )
    assert got == pytest.approx(want, abs=1e-5)
    assert got.index(max(got)) == 5


def test_moving_mean_repeats_the_ends_and_passes_over_padding() -> None:
    x = torch.tensor([[[9.0, 1.0, 9.0, 2.0, 4.0, 9.0]]])
    inside = torch.tensor([[[False, True, False, True, True, False]]])
    for reach, shift in ((0, 0), (1, 0), (2, 1), (2, -2), (9, 9), (1, -8)):
        got = moving_mean(x, inside, torch.tensor([[reach]]), torch.tensor([[shift]]))
        packed = [1.0, 2.0, 4.0]
        want = [
            mean(packed[min(max(j, 0), 2)] for j in range(n + shift - reach, n + shift + reach + 1))
            for n in range(3)
        ]
        assert got[inside].tolist() == pytest.approx(want)


def test_queries_of_decode_steps_are_taken_in_order() -> None:
    layer = draw(B=1, S=19, seed=6)
    run = Run(recipe(schedule="every:7"), layer.part(0, 12))
    for t in range(12, 19):
        assert len(run.kept()[0][0]) == t
        run.feed(layer.part(t, t + 1))
    want = expected(layer, lambda row, h: formula(layer, row, h))[0]
    assert run.kept() == [[best(head, BUDGET, range(19 - W, 19)) for head in want]]


def test_pyramid() -> None:
    layers = [draw(S=40, seed=seed) for seed in (7, 8)]
    made = recipe(12, pyramid=True)
    assert made.allocator == Pyramid(beta=20.0)
    run = Run(made, *layers)
    lengths = [len(run.kept(ordinal)[0][0]) for ordinal in range(2)]
    assert lengths[0] > lengths[1] and sum(lengths) == 24


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "both"},
        {"gqa": "sum"},
        {"kernel": 4},
        {"alpha": 0.0},
        {"beta": 0.0},
        {"window": 0},
        {"power": -1.0},
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)
