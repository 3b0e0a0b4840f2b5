"""Knorm: minus the key's norm."""

from __future__ import annotations

import torch

import kvsieve

from .support import Layer, Row, Vector, assert_close, best, draw, expected, kept, norm, scores


def formula(row: Row, h: int) -> Vector:
    return [-norm(row.k[h][i]) for i in range(row.n)]


def test_score_is_minus_the_norm() -> None:
    layer = draw(padding=(0, 3))
    assert_close(scores(layer, kvsieve.recipe("knorm", budget=5)), expected(layer, formula))


def test_hand_example_keeps_the_small_norms() -> None:
    keys = torch.tensor([3.0, 1.0, 2.0, 4.0])[None, None, :, None] * torch.tensor([0.6, 0.8])
    layer = Layer(queries=torch.zeros(1, 1, 1, 4, 2), keys=keys, values=keys)
    assert kept(kvsieve.recipe("knorm", budget=3), layer) == [[[0, 1, 2]]]
    assert kept(kvsieve.recipe("knorm", budget=2), layer) == [[[1, 2]]]


def test_kept_set_is_the_smallest_norms_of_each_head() -> None:
    layer = draw(padding=(0, 3), seed=1)
    want = [[best(head, 5) for head in row] for row in expected(layer, formula)]
    assert kept(kvsieve.recipe("knorm", budget=5), layer) == want
