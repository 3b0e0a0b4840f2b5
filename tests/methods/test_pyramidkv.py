"""PyramidKV: SnapKV's scores, budgets that fall from the first to the last layer."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve.allocators import Pyramid
from kvsieve.interfaces import Round

from .support import Run, best, draw, scores


def lengths(budget: int, *, layers: int, slots: int, window: int, beta: float = 20.0) -> list[int]:
    """What the allocator gives each layer of a model."""
    round = Round(
        budgets=torch.tensor([budget]),
        layers=tuple(range(layers)),
        layer_count=layers,
        live=[torch.full((1, 2), slots)] * layers,
        window=window,
    )
    counts = Pyramid(beta=beta).allocate([torch.zeros(1, 2, slots)] * layers, round)
    assert all(count[0, 0] == count[0, 1] for count in counts)
    return [int(count[0, 0]) for count in counts]


def exact(budget: int, *, layers: int, slots: int, window: int, beta: float = 20.0) -> list[float]:
    """The paper's line, before rounding."""
    least = (budget - window) / beta
    most = 2 * (budget - window) - least
    if most > slots - window:
        most = slots - window
        least = 2 * (budget - window) - most
    return [window + most - layer * (most - least) / (layers - 1) for layer in range(layers)]


def test_hand_example() -> None:
    # free 20, least 2, most 38, three steps of 12
    assert lengths(28, layers=4, slots=100, window=8, beta=10) == [46, 34, 22, 10]
    # clipped at the layer's slots: most 32, least 8, three steps of 8
    assert lengths(28, layers=4, slots=40, window=8, beta=10) == [40, 32, 24, 16]


CASES = [
    (budget, layers, slots, window, beta)
    for budget in (64, 100, 257, 1000)
    for layers in (2, 3, 28, 32)
    for slots in (300, 1500)
    for window, beta in ((8, 20.0), (32, 20.0), (32, 1.0), (16, 7.0))
    if budget < slots
]


@pytest.mark.parametrize(("budget", "layers", "slots", "window", "beta"), CASES)
def test_layers_follow_the_line_and_add_up_exactly(
    budget: int, layers: int, slots: int, window: int, beta: float
) -> None:
    shape = {"layers": layers, "slots": slots, "window": window}
    got = lengths(budget, beta=beta, **shape)
    assert sum(got) == layers * budget
    line = exact(budget, beta=beta, **shape)
    for layer in range(layers):
        assert abs(got[layer] - line[layer]) < 1  # rounded, one way or the other
        assert window <= got[layer] <= slots
    if beta > 1:
        assert got[0] > budget > got[-1]


def test_one_layer_keeps_the_mean() -> None:
    assert lengths(50, layers=1, slots=100, window=8) == [50]


def test_each_layer_keeps_its_own_number_of_snapkv_s_best() -> None:
    drawn = [draw(S=30, padding=(0, 2), seed=seed) for seed in range(3)]
    run = Run(kvsieve.recipe("pyramidkv", budget=12, window=3, kernel=3, beta=4), *drawn)
    # free 9, least 2.25, most 15.75: 18.75, 12, 5.25, rounded so that they add up to 36
    for ordinal, count in enumerate((18, 12, 6)):
        snap = scores(drawn[ordinal], kvsieve.recipe("snapkv", budget=12, window=3, kernel=3))
        want = [
            [best(head, count, range(len(head) - 3, len(head))) for head in row] for row in snap
        ]
        assert run.kept(ordinal) == want
