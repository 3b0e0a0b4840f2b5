"""What calibration measures, against loops over all queries."""

from __future__ import annotations

import math

import pytest
import torch
from methods.support import FULL, PARTIAL, Layer, Row, Run, Vector, dot, draw, rows, turned

from kvsieve import Recipe
from kvsieve.collector import Collector
from kvsieve.errors import RecipeError
from kvsieve.statistics import Identity, Statistics

SINKS, FIRST, RECENT = 2, 3, 4
WHO = Identity(architecture="x", layers=1, heads=2, group=2, head_dim=4, sample=torch.zeros(1))


def measured(*passages: Layer, **options: int) -> Statistics:
    sizes = {"sinks": SINKS, "first": FIRST, "recent": RECENT} | options
    collector = Collector(**sizes)
    for passage in passages:
        Run(Recipe(method="calibrate", scorer=collector), passage)
    return collector.statistics(WHO, passages=len(passages))


def asked(passages: tuple[Layer, ...], h: int, g: int) -> list[tuple[int, Vector]]:
    """Every query behind the sinks, with its position."""
    return [(t, row.q[h][g][t]) for x in passages for row in rows(x) for t in range(SINKS, row.n)]


def passages(angles: tuple[float, ...]) -> tuple[Layer, ...]:
    return tuple(draw(B=1, S=n, angles=angles, seed=n) for n in (14, 9, 17))


@pytest.mark.parametrize("angles", [FULL, PARTIAL])
def test_moments_of_queries_before_rotation(angles: tuple[float, ...]) -> None:
    given = passages(angles)
    got = measured(*given)
    for h in range(2):
        for g in range(2):
            plain = torch.tensor([turned(q, -t, angles) for t, q in asked(given, h, g)]).double()
            close(got.tensors["query_mean"][0, h, g], plain.mean(0))
            close(got.tensors["query_covariance"][0, h, g], torch.cov(plain.T))
    assert got.facts == {
        "passages": 3, "sinks": SINKS, "first": FIRST, "recent": RECENT
    }  # fmt: skip


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def test_filters_are_the_first_right_singular_vectors_turned_to_the_queries() -> None:
    given = passages(FULL)
    got = measured(*given).tensors["query_filter"]
    for h in range(2):
        mains = []
        for g in range(2):
            queries = torch.tensor([q for _, q in asked(given, h, g)], dtype=torch.float64)
            main = torch.linalg.svd(queries, full_matrices=False).Vh[0]
            mains.append(main if float((queries @ main).sum()) > 0 else -main)
        close(got[0, h], torch.stack(mains).mean(0), 1e-4)


def gate(given: tuple[Layer, ...], h: int) -> float:
    """How much of the output's norm goes where first and recent tokens alone are seen."""
    apart = whole = 0.0
    for row in (row for x in given for row in rows(x)):
        for g in row.groups:
            for t in range(FIRST + RECENT, row.n):
                weights = row.attention(h, g, t)
                near = [i < FIRST or i > t - RECENT for i in range(row.n)]
                left = [w if n else 0.0 for w, n in zip(weights, near, strict=True)]
                out, cut = output(row, h, weights), output(row, h, [w / sum(left) for w in left])
                apart += sum((a - b) ** 2 for a, b in zip(out, cut, strict=True))
                whole += dot(out, out)
    return min(1.0, math.sqrt(apart / whole))


def output(row: Row, h: int, weights: Vector) -> Vector:
    return [sum(w * v[d] for w, v in zip(weights, row.v[h], strict=True)) for d in range(4)]


def test_gates_are_what_a_head_loses_as_a_streaming_head() -> None:
    given = passages(FULL)
    got = measured(*given).tensors["head_gate"]
    close(got[0], torch.tensor([gate(given, h) for h in range(2)]))
    assert 0.1 < float(got.min()) and float(got.max()) < 1


def test_a_head_that_looks_at_recent_tokens_has_no_gate() -> None:
    layer = draw(B=1, S=20, D=20, angles=(0.0,), seed=3)
    layer.keys[:] = 0
    layer.keys[0, :, torch.arange(20), torch.arange(20)] = 60.0
    layer.queries[0, 0, :] = layer.keys[0, 0]  # each token looks at itself
    layer.queries[0, 1, :] = layer.keys[0, 1].roll(6, 0)  # at the sixth before it
    got = measured(layer).tensors["head_gate"][0]
    assert float(got[0]) < 1e-3 and float(got[1]) > 0.9


def test_short_passages_have_no_gates_and_say_why() -> None:
    got = measured(draw(B=1, S=FIRST + RECENT, angles=FULL))
    assert "head_gate" not in got.tensors and "query_filter" in got.tensors
    assert got.facts["no_head_gate"] == "Head gates need passages of more than 7 tokens. "
    assert "head_gate" in measured(draw(B=1, S=FIRST + RECENT + 1, angles=FULL)).tensors


def test_too_little_text() -> None:
    for S in (1, SINKS, SINKS + 1):
        with pytest.raises(RecipeError, match="too few to measure anything"):
            measured(draw(B=1, S=S, angles=FULL))
    with pytest.raises(RecipeError, match="has 0 tokens"):
        measured()
    measured(draw(B=1, S=SINKS + 2, angles=FULL))


@pytest.mark.parametrize("sizes", [{"sinks": -1}, {"first": -1}, {"recent": 0}])
def test_sizes_that_mean_nothing(sizes: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="recent 1 or more"):
        Collector(**sizes)
