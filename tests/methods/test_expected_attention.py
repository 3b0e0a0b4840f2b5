"""Expected Attention: the closed-form weight that a key will get from Gaussian queries."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import padded, prompt, tiny
from running import kept as held_by

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Signal
from kvsieve.methods.expected_attention import ExpectedAttention
from kvsieve.moments import QueryMoments
from kvsieve.statistics import Statistics

from .allocations import Allocations
from .calibrated import given, random
from .support import (
    FULL,
    PARTIAL,
    Layer,
    Row,
    Run,
    Vector,
    assert_close,
    best,
    dot,
    draw,
    expected,
    kept,
    mean,
    norm,
    rows,
    scores,
    shared,
    softmax,
    table,
    turned,
)

Matrix = list[Vector]


def rotation(position: int, angles: tuple[float, ...], D: int) -> Matrix:
    """RoPE at one position as a dense matrix."""
    identity = [[float(i == j) for j in range(D)] for i in range(D)]
    return transposed([turned(x, position, angles) for x in identity])


def apply(matrix: Matrix, x: Vector) -> Vector:
    return [dot(row, x) for row in matrix]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def matmul(a: Matrix, b: Matrix) -> Matrix:
    return [[dot(row, column) for column in transposed(b)] for row in a]


def moments(queries: list[Vector]) -> tuple[Vector, Matrix]:
    D = len(queries[0])
    mu = [mean(q[d] for q in queries) for d in range(D)]
    sigma = [
        [mean((q[d] - mu[d]) * (q[e] - mu[e]) for q in queries) for e in range(D)] for d in range(D)
    ]
    return mu, sigma


def calibrated(stats: Statistics, ordinal: int, h: int, g: int) -> tuple[Vector, Matrix]:
    named = (stats.tensors[f"query_{name}"][ordinal, h, g] for name in ("mean", "covariance"))
    mu, sigma = (x.double().tolist() for x in named)
    return mu, sigma


def log_expected(mu: Vector, sigma: Matrix, key: Vector, scale: float) -> float:
    return dot(mu, key) * scale + dot(key, apply(sigma, key)) * scale**2 / 2


def formula(
    row: Row,
    h: int,
    angles: tuple[float, ...],
    *,
    sinks: int = 2,
    future: int = 6,
    epsilon: float = 0.01,
    covariance: bool = True,
    value_norm: bool = True,
    asked: range | None = None,
    now: int | None = None,
    stats: Statistics | None = None,
    ordinal: int = 0,
) -> Vector:
    """The paper's steps; ``asked``: positions of the queries; ``now``: the next position.

    ``stats``: moments are given, and no query is looked at.
    """
    D, n = len(row.k[h][0]), row.n
    now = n if now is None else now
    ahead = [rotation(now + j, angles, D) for j in range(future)]
    R = [[mean(a[i][j] for a in ahead) for j in range(D)] for i in range(D)]
    per_head = []
    for g in row.groups:
        plain = [
            apply(transposed(rotation(t, angles, D)), row.q[h][g][t])
            for t in (range(n) if asked is None else asked)
            if t >= sinks
        ]
        mu, sigma = moments(plain) if stats is None else calibrated(stats, ordinal, h, g)
        mu, sigma = apply(R, mu), matmul(matmul(R, sigma), transposed(R))
        if not covariance:
            sigma = [[0.0] * D for _ in range(D)]
        logits = [log_expected(mu, sigma, k, row.scale) for k in row.k[h][sinks:]]
        per_head.append([0.0] * sinks + softmax(logits))
    p = [mean(x) for x in zip(*per_head, strict=True)]
    if not value_norm:
        return p
    return [(x + epsilon) * norm(v) for x, v in zip(p, row.v[h], strict=True)]


def recipe(budget: int = 6, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe(
        "expected-attention", budget=budget, **{"sinks": 2, "future": 6, **options}
    )


@pytest.mark.parametrize("angles", [FULL, PARTIAL])
@pytest.mark.parametrize(
    "options",
    [{}, {"covariance": False}, {"value_norm": False}, {"epsilon": 0.0}, {"future": 1}],
)
def test_score(angles: tuple[float, ...], options: dict[str, float]) -> None:
    layer = draw(S=14, padding=(0, 4), angles=angles)
    want = expected(layer, lambda row, h: formula(row, h, angles, **options))
    assert_close(scores(layer, recipe(**options)), want, skip=2)


def gaussian(layer_keys: torch.Tensor, queries: torch.Tensor) -> Layer:
    """One head without RoPE whose queries are given."""
    return Layer(
        queries=queries[None, None, None],
        keys=layer_keys[None, None],
        values=torch.ones_like(layer_keys)[None, None],
        angles=(0.0,),
    )


def test_hand_example() -> None:
    """mu (1, 0), Sigma diag(2, 0): l is (1.2071, 0, -.2071, 0)."""
    spread = math.sqrt(2)
    queries = torch.tensor([[1 + spread, 0.0], [1 - spread, 0.0]] * 2)
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    options = {"sinks": 0, "value_norm": False}
    got = scores(gaussian(keys, queries), recipe(2, **options))[0][0]
    assert got == pytest.approx([0.5431, 0.1624, 0.1320, 0.1624], abs=1e-4)
    got = scores(gaussian(keys, queries), recipe(2, covariance=False, **options))[0][0]
    assert got == pytest.approx(softmax([math.sqrt(0.5), 0.0, -math.sqrt(0.5), 0.0]), abs=1e-4)


def test_closed_form_is_the_mean_over_drawn_queries() -> None:
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(8, 4, generator=made)
    observed = torch.randn(8, 4, generator=made) * 0.8 + 0.5
    got = scores(gaussian(keys, observed), recipe(2, sinks=0, value_norm=False))[0][0]
    mu, sigma = observed.double().mean(0), torch.cov(observed.double().T, correction=0)
    root = torch.linalg.cholesky(sigma + 1e-9 * torch.eye(4))
    drawn = mu + torch.randn(400_000, 4, generator=made, dtype=torch.float64) @ root.T
    log_mean = (drawn @ keys.double().T / 2).logsumexp(0)
    assert got == pytest.approx(log_mean.softmax(0).tolist(), abs=1e-2, rel=1e-2)


def test_one_future_query_of_no_spread_is_that_query_s_attention() -> None:
    """The same query at every position, rotated on to position n: plain softmax attention."""
    layer = draw(B=1, H=1, G=1, S=10, angles=FULL, seed=1)
    plain = [0.7, -1.1, 0.4, 2.0]
    turned = [apply(rotation(t, FULL, 4), plain) for t in range(11)]
    layer.queries[0, 0, 0] = torch.tensor(turned[:10])
    got = scores(layer, recipe(3, sinks=0, future=1, value_norm=False))[0][0]
    want = softmax([dot(turned[10], k) / 2 for k in rows(layer)[0].k[0]])
    assert got == pytest.approx(want, abs=1e-5)


def test_a_long_future_forgets_fast_planes() -> None:
    layer = draw(B=1, S=10, angles=(1.0, 2.0), seed=2)
    got = scores(layer, recipe(3, sinks=0, future=20_000, value_norm=False))[0][0]
    assert got == pytest.approx([0.1] * 10, abs=1e-3)


def test_a_large_epsilon_orders_by_value_norm() -> None:
    layer = draw(B=1, S=12, angles=FULL, seed=3)
    got = scores(layer, recipe(3, epsilon=1e6))[0]
    for h, values in enumerate(rows(layer)[0].v):
        norms = [norm(v) for v in values]
        order = sorted(range(2, 12), key=lambda i: norms[i])
        assert sorted(range(2, 12), key=lambda i: got[h][i]) == order


def test_repeated_kv_heads_average_to_the_grouped_score() -> None:
    layer = draw(B=1, H=1, G=3, S=10, angles=FULL, seed=4)
    apart = Layer(
        queries=layer.queries.transpose(1, 2),
        keys=layer.keys.expand(1, 3, 10, 4),
        values=layer.values.expand(1, 3, 10, 4),
        angles=FULL,
    )
    heads = scores(apart, recipe(3))[0]
    assert_close(scores(layer, recipe(3)), [[[mean(x) for x in zip(*heads, strict=True)]]], skip=2)


@pytest.mark.parametrize("adaptive", [True, False])
def test_kept_set(adaptive: bool) -> None:
    layer = draw(H=3, S=20, padding=(0, 2), angles=FULL, seed=5)
    layer.values[:, 1:] *= 50  # two heads that would leave the other no more than its sink
    want = expected(layer, lambda row, h: formula(row, h, FULL, sinks=1))
    if adaptive:
        stays = [shared(row, 10, 0.2, first=1) for row in want]
        assert min(len(head) for row in stays for head in row) == 2
    else:
        stays = [[best(head, 10, [0]) for head in row] for row in want]
    assert kept(recipe(10, sinks=1, adaptive=adaptive), layer) == stays


def test_while_decoding_the_last_queries_and_the_true_position_count() -> None:
    layer = draw(B=1, S=17, angles=FULL, seed=6)
    made = recipe(8, adaptive=False, interval=5)
    assert isinstance(made.scorer, ExpectedAttention)
    made = dataclasses.replace(made, scorer=dataclasses.replace(made.scorer, memory=7))
    run = Run(made, layer.part(0, 12))
    row = rows(layer)[0]
    slots = run.kept()[0]
    for t in range(12, 17):
        run.feed(layer.part(t, t + 1))
    slots = [[*head, *range(12, 17)] for head in slots]
    want = []
    for h, held in enumerate(slots):
        part = Row(
            q=row.q,
            k=[[x[i] for i in held] for x in row.k],
            v=[[x[i] for i in held] for x in row.v],
            scale=row.scale,
        )
        got = formula(part, h, FULL, asked=range(10, 17), now=17)
        want.append([held[j] for j in best(got, 8, [0, 1])])
    assert run.kept() == [want]


@torch.no_grad()
def test_positions_that_count_padding_make_no_difference() -> None:
    """The future starts where the caller's positions are, whatever they count."""
    ids, mask = padded([prompt(40), prompt(23, 1)])
    small = kvsieve.recipe("expected-attention", budget=12, sinks=2, future=8, interval=2)
    found = []
    for counted in (mask.cumsum(1) - 1, torch.arange(40)[None].expand(2, -1) + 100):
        with kvsieve.Cache(tiny("llama"), small) as cache:
            place, more = counted.clamp_min(0), mask
            for _ in range(4):
                tiny("llama")(ids, attention_mask=more, position_ids=place, past_key_values=cache)
                found.append(held_by(cache))
                more = torch.cat([more, more.new_ones(2, 1)], 1)
                ids, place = prompt(60)[:, :2].view(2, 1), place[:, -1:] + 1
        ids = padded([prompt(40), prompt(23, 1)])[0]
    assert found[:4] == found[4:]


def test_a_prompt_of_sinks_alone_is_finite() -> None:
    layer = draw(B=2, S=8, padding=(0, 6), angles=FULL)
    made = recipe(4)
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    store_scores = made.scorer.score(step, store)
    assert bool(store_scores[0].isfinite().all())
    assert kept(recipe(4), layer)[1] == [[0, 1], [0, 1]]


# -- moments of calibration text -------------------------------------------------------------------


def statistics(layers: int = 2) -> Statistics:
    root = random(layers, 2, 2, 4, 4, seed=1)
    return given(
        query_mean=random(layers, 2, 2, 4),
        query_covariance=root @ root.transpose(-1, -2) / 4,
    )


@pytest.mark.parametrize("angles", [FULL, PARTIAL])
@pytest.mark.parametrize("options", [{}, {"covariance": False}])
def test_score_by_calibrated_moments(angles: tuple[float, ...], options: dict[str, bool]) -> None:
    layer, stats = draw(S=14, padding=(0, 4), angles=angles, seed=7), statistics()
    want = expected(
        layer, lambda row, h: formula(row, h, angles, stats=stats, ordinal=1, **options)
    )
    assert_close(scores(layer, recipe(stats=stats, **options), ordinal=1), want, skip=2)


def test_calibrated_moments_need_no_queries_kept() -> None:
    made = recipe(stats=statistics())
    assert made.scorer is not None and made.scorer.window == 0 and made.scorer.moments is None
    assert made.needs == {Signal.STATISTICS, Signal.PRE_ROPE, Signal.VALUES}
    assert Signal.QUERY_WINDOW in recipe().needs and Signal.STATISTICS not in recipe().needs


def test_calibrated_while_decoding_the_true_position_counts() -> None:
    layer, stats = draw(B=1, S=17, angles=FULL, seed=8), statistics()
    run = Run(recipe(8, adaptive=False, interval=5, stats=stats), layer.part(0, 12))
    slots = [[*head, *range(12, 17)] for head in run.kept()[0]]
    for t in range(12, 17):
        run.feed(layer.part(t, t + 1))
    row, want = rows(layer)[0], []
    for h, held in enumerate(slots):
        part = Row(
            q=row.q,
            k=[[x[i] for i in held] for x in row.k],
            v=[[x[i] for i in held] for x in row.v],
            scale=row.scale,
        )
        got = formula(part, h, FULL, now=17, asked=range(17), stats=stats)
        want.append([held[j] for j in best(got, 8, [0, 1])])
    assert run.kept() == [want]


def test_options_that_mean_nothing() -> None:
    for wrong in ({"future": 0}, {"epsilon": -1.0}, {"epsilon": math.nan}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            recipe(**wrong)


# -- memory ----------------------------------------------------------------------------------------


def test_memory_stays_beside_the_layer() -> None:
    """All query heads' products with the covariance at once would take 2 x 4 times the keys."""
    layer = draw(B=1, H=2, G=4, S=40_000, D=64, angles=(0.1,))
    made = recipe(
        stats=given(query_mean=random(1, 2, 4, 64), query_covariance=random(1, 2, 4, 64, 64))
    )
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    with Allocations([*store.table.tensors(), layer.queries]) as work:
        made.scorer.score(step, store)
    assert work.peak < 1.5 * store.keys.numel() * 4


def test_moments_of_a_long_prompt_are_taken_in_blocks() -> None:
    layer = draw(B=1, H=2, G=4, S=40_000, D=32, angles=(0.1,))
    made = recipe()
    assert made.scorer is not None
    step, _ = table(layer, made.scorer)
    taken = QueryMoments.empty(step.query)
    with Allocations([layer.queries]) as work:
        taken.take_in(step, 4)
    assert work.peak < 2 * layer.queries.numel() * 4
    plain = step.unrotated(step.query, step.positions)[:, :, :, 4:].double()
    torch.testing.assert_close(taken.mean.double(), plain.mean(3), rtol=1e-4, atol=1e-4)
    centred = plain - plain.mean(3, keepdim=True)
    want = centred.transpose(-1, -2) @ centred / plain.shape[3]
    torch.testing.assert_close(taken.covariance().double(), want, rtol=1e-3, atol=1e-3)
