"""AdaKV: the heads of a layer share its budget by one top-k, each with a floor."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError

from .support import Layer, draw, kept, norm, rows, scores, shared


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_kept_set_over_key_norms(floor: float) -> None:
    layer = draw(H=3, S=20, padding=(0, 4))
    # One head of small keys takes most of the budget where the floor lets it.
    layer.keys[:, 1] *= 0.3
    minus_norms = [[[-norm(k) for k in head] for head in row.k] for row in rows(layer)]
    want = [shared(row, 6, floor) for row in minus_norms]
    got = kept(kvsieve.recipe("adakv", scorer="knorm", budget=6, floor=floor), layer)
    assert got == want
    for row in got:
        assert sum(len(head) for head in row) == 18
        assert min(len(head) for head in row) >= int(6 * floor)
    if floor == 0.2:
        assert [[len(head) for head in row] for row in got] != [[6, 6, 6]] * 2


def test_kept_set_over_snapkv_with_its_window() -> None:
    layer = draw(H=3, S=20, padding=(0, 4), seed=1)
    snap = scores(layer, kvsieve.recipe("snapkv", budget=6, window=2, kernel=3))
    want = [shared(row, 6, 0.2, window=2) for row in snap]
    got = kept(kvsieve.recipe("adakv", budget=6, window=2, kernel=3), layer)
    assert got == want


def test_floor_of_one_is_the_scorer_by_itself() -> None:
    layer = draw(H=3, S=20, seed=2)
    whole = kvsieve.recipe("adakv", scorer="keydiff", budget=6, floor=1.0)
    assert kept(whole, layer) == kept(kvsieve.recipe("keydiff", budget=6), layer)


def test_hand_example() -> None:
    norms = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    keys = norms[None, :, :, None]
    layer = Layer(queries=torch.zeros(1, 2, 1, 4, 1), keys=keys, values=keys)
    flat = kvsieve.recipe("adakv", scorer="knorm", budget=2, floor=0.0)
    assert kept(flat, layer) == [[[0, 1, 2, 3], []]]
    half = kvsieve.recipe("adakv", scorer="knorm", budget=2, floor=0.5)
    assert kept(half, layer) == [[[0, 1, 2], [0]]]


def test_ties_are_broken_by_head_and_slot_and_totals_are_exact() -> None:
    keys = torch.ones(1, 3, 10, 1)
    layer = Layer(queries=torch.zeros(1, 3, 1, 10, 1), keys=keys, values=keys)
    got = kept(kvsieve.recipe("adakv", scorer="knorm", budget=4, floor=0.25), layer)
    assert got == [[list(range(10)), [0], [0]]]


def test_refuses_scorers_that_allocate_themselves() -> None:
    for scorer in ("laprox", "full", "expected-attention"):
        with pytest.raises(RecipeError):
            kvsieve.recipe("adakv", scorer=scorer, budget=6)
