"""Leverage scores of keys before rotation, from a random sketch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.methods.leverage import KeyLeverage
from kvsieve.scoring import standardise
from kvsieve.sketch import gaussian, leverage
from kvsieve.store.rope import rotate

from .support import FULL, Layer, best, draw, kept, rows, scores, table, turned


def recipe(budget: int, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("leverage", budget=budget, **options)


def unrotated(layer: Layer) -> list[list[torch.Tensor]]:
    """Each row's keys ``[n, D]`` per head in fp64, with RoPE undone."""
    return [
        [
            torch.tensor([turned(k, -t, FULL) for t, k in enumerate(head)], dtype=torch.float64)
            for head in row.k
        ]
        for row in rows(layer)
    ]


def projection_diagonal(keys: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
    """Diagonal of the S x S matrix that the sheet names, built in full."""
    x = (keys - keys.mean(0)) @ sketch.double()
    inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(x.shape[1], dtype=torch.float64))
    return torch.diagonal(x @ inverse @ x.T)


@pytest.mark.parametrize("width", [2, 4, 48])
def test_score_and_kept_set(width: int) -> None:
    layer = draw(S=16, padding=(0, 5), angles=FULL)
    drawn = gaussian(4, width, seed=0, heads=2)
    want = []
    for heads in unrotated(layer):
        raw = torch.stack([projection_diagonal(k, drawn[h]) for h, k in enumerate(heads)])
        assert 0 <= float(raw.min()) and float(raw.max()) <= 1
        assert float(raw.sum(1).max()) <= width
        want.append(((raw - raw.mean()) / raw.std()).tolist())
    got = scores(layer, recipe(6, sketch=width))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)
    stays = [[best(head, 6) for head in row] for row in want]
    assert kept(recipe(6, sketch=width), layer) == stays


def test_a_key_that_nothing_else_explains_has_leverage_one() -> None:
    keys = torch.zeros(1, 1, 20, 4)
    keys[..., 0] = torch.arange(20) % 2 * 10.0
    keys[0, 0, 7, 2] = 50.0
    got = leverage(keys, torch.ones(1, 1, 20, dtype=torch.bool), gaussian(4, 4, seed=1, heads=1))
    assert int(got.argmax()) == 7
    assert float(got[0, 0, 7]) == pytest.approx(1.0, abs=0.06)
    assert float(got.sum()) == pytest.approx(2.0, abs=0.01)  # two directions are in use


def test_turning_keys_and_sketch_together_changes_nothing() -> None:
    made = torch.Generator().manual_seed(2)
    keys, inside = torch.randn(1, 2, 15, 6, generator=made), torch.ones(1, 1, 15, dtype=torch.bool)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=made))[0]
    drawn = gaussian(6, 3, seed=0, heads=2)
    a, b = leverage(keys, inside, drawn), leverage(keys @ turn, inside, turn.T @ drawn)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_large_keys_of_low_rank_stay_finite() -> None:
    made = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 1, 300, 2, generator=made) @ torch.randn(2, 16, generator=made)
    inside, drawn = torch.ones(1, 1, 300, dtype=torch.bool), gaussian(16, 16, seed=0, heads=1)
    assert float(leverage(keys, inside, drawn).sum()) == pytest.approx(2.0, abs=0.01)
    got = leverage(keys * 1e5, inside, drawn)  # rounding spans the other directions
    assert bool(((got >= 0) & (got <= 1 + 1e-5)).all())


def test_rotation_is_undone_wherever_a_token_stands() -> None:
    layer = draw(B=1, S=14, angles=FULL, seed=4)
    cos, sin = layer._tables(torch.arange(14)[None])
    moved = replace(layer, keys=rotate(layer.keys, cos[:, None], sin[:, None]))
    flat = replace(layer, angles=(0.0, 0.0))
    for a, b in zip(scores(moved, recipe(5))[0], scores(flat, recipe(5))[0], strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_dead_slots_have_no_part() -> None:
    layer = draw(S=16, padding=(0, 5), angles=FULL)
    clean = scores(layer, recipe(6))[1]
    layer.keys[1, :, :5] = float("nan")
    step, store = table(layer, KeyLeverage())
    got = KeyLeverage().score(step, store)
    assert bool(got.isfinite().all())
    assert got[1, :, 5:].double().tolist() == clean


def test_layers_and_seeds_draw_their_own_sketches() -> None:
    layer = draw(S=16, angles=FULL)
    first = scores(layer, recipe(6, sketch=2))
    assert first == scores(layer, recipe(6, sketch=2))
    assert first != scores(layer, recipe(6, sketch=2), ordinal=1)
    assert first != scores(layer, recipe(6, sketch=2, seed=1))


def test_standardised_scores_have_mean_zero_and_deviation_one() -> None:
    given = torch.rand(2, 3, 9) * 7 + 2
    inside = torch.arange(9) >= torch.tensor([[[0]], [[4]]])
    got = standardise(given, inside, dim=(1, 2), correction=1)
    for b, start in ((0, 0), (1, 4)):
        part = got[b, :, start:]
        assert float(part.mean()) == pytest.approx(0, abs=1e-5)
        assert float(part.std()) == pytest.approx(1, abs=1e-5)
    same, everywhere = torch.ones(1, 1, 5), torch.ones(1, 1, 5, dtype=torch.bool)
    assert not standardise(same, everywhere, dim=(1, 2), correction=1).any()


def test_refuses_an_empty_sketch() -> None:
    with pytest.raises(RecipeError, match="1 column or more"):
        recipe(6, sketch=0)
