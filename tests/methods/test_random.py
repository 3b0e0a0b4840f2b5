"""Random eviction: uniform, seeded, and a function of the token's position alone."""

from __future__ import annotations

import itertools

import torch

import kvsieve
from kvsieve.interfaces import Scorer
from kvsieve.sketch import uniform

from .support import Layer, Run, draw, kept, scores, table


def numbers(seed: int = 0, ordinal: int = 0, S: int = 4096) -> torch.Tensor:
    """Scores ``[H, S]`` of one row."""
    layer = draw(B=1, S=S, D=1, G=1)
    scorer = kvsieve.recipe("random", seed=seed, budget=1).scorer
    assert isinstance(scorer, Scorer)
    return scorer.score(*table(layer, scorer, ordinal))[0]


def test_scores_are_uniform() -> None:
    drawn = numbers()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=16, min=0, max=1)
    chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi < 37.7  # chi-square of 15 degrees of freedom: 0.1 % of good generators exceed it
    neighbours = torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))[0, 1]
    assert abs(float(neighbours)) < 0.06


def test_seeds_layers_and_heads_are_independent() -> None:
    streams = [*numbers(), *numbers(seed=1), *numbers(ordinal=1), *numbers(seed=2, ordinal=3)]
    for a, b in itertools.combinations(streams, 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.06


def test_heads_of_another_worker_have_their_own_numbers() -> None:
    position = torch.arange(16)[None, None]
    whole = uniform(position, 2, 4, 3)
    assert torch.cat([uniform(position, 2, 2, 3, first) for first in (0, 2)], 1).equal(whole)


def test_the_same_position_has_the_same_number_alone_padded_and_again() -> None:
    padded, alone = draw(B=2, padding=(0, 3)), draw(B=1, S=9, seed=5)
    recipe = kvsieve.recipe("random", budget=4, seed=3)
    assert scores(padded, recipe)[1] == scores(alone, recipe)[0]
    assert scores(padded, recipe)[0][0][:9] == scores(alone, recipe)[0][0]
    assert scores(alone, recipe) == scores(alone, recipe)


def test_kept_set_is_the_best_numbers_whatever_the_chunks() -> None:
    layer = draw(S=20)
    recipe = kvsieve.recipe("random", budget=6)
    want = kept(recipe, layer)
    top = torch.tensor(scores(layer, recipe)).topk(6).indices.sort().values
    assert want == top.tolist()
    chunked = Run(recipe, layer.part(0, 9))
    chunked.feed(layer.part(9, 20))
    assert chunked.kept() == want


def test_numbers_do_not_depend_on_content() -> None:
    a, b = draw(seed=1), draw(seed=2)
    assert isinstance(a, Layer)
    recipe = kvsieve.recipe("random", budget=4)
    assert scores(a, recipe) == scores(b, recipe)
