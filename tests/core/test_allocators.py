"""Allocators: exact sums, floors, ties by index."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsieve.allocators import Pyramid, TopK, Uniform, top_mask
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Round, Scope

few = settings(max_examples=80, deadline=None)


def draw_scores(data: st.DataObject, layers: int, B: int) -> list[Tensor]:
    """Scores with many ties, dead slots (-inf) and protected ones (+inf)."""
    values = st.sampled_from([-torch.inf, -1.0, 0.0, 0.0, 0.0, 1.0, 2.0, torch.inf])
    out = []
    for _ in range(layers):
        H, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        flat = data.draw(st.lists(values, min_size=B * H * S, max_size=B * H * S))
        out.append(torch.tensor(flat).view(B, H, S))
    return out


def round_of(scores: list[Tensor], budgets: list[int], window: int = 0) -> Round:
    return Round(
        budgets=torch.tensor(budgets),
        layers=tuple(range(len(scores))),
        layer_count=len(scores),
        live=[(score > -torch.inf).sum(-1) for score in scores],
        window=window,
    )


@few
@given(st.data())
def test_top_mask_marks_exactly_the_best(data: st.DataObject) -> None:
    scores = draw_scores(data, 1, 2)[0]
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 10), min_size=2, max_size=2)))
    mask = top_mask(scores, counts[:, None])
    for b in range(2):
        for h in range(scores.shape[1]):
            row = scores[b, h].tolist()
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[: int(counts[b])]
            assert mask[b, h].nonzero()[:, 0].tolist() == sorted(best)


@few
@given(st.data())
def test_uniform_is_the_budget_or_what_there_is(data: st.DataObject) -> None:
    scores = draw_scores(data, 2, 2)
    budgets = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=2))
    round = round_of(scores, budgets)
    for counts, live in zip(Uniform().allocate(scores, round), round.live, strict=True):
        for b in range(2):
            assert counts[b].tolist() == [min(budgets[b], n) for n in live[b].tolist()]


@few
@given(st.data(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_topk_sums_are_exact_and_floors_hold(data: st.DataObject, floor: float) -> None:
    layers = data.draw(st.integers(1, 3))
    scores = draw_scores(data, layers, 2)
    budgets = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=2))
    round = round_of(scores, budgets)
    scope = Scope.LAYER if layers == 1 else Scope.MODEL
    counts = TopK(scope=scope, floor=floor).allocate(scores, round)
    heads = sum(score.shape[1] for score in scores)
    for b in range(2):
        live = sum(int(n[b].sum()) for n in round.live)
        assert sum(int(n[b].sum()) for n in counts) == min(budgets[b] * heads, live)
    for n, live in zip(counts, round.live, strict=True):
        assert bool((n <= live).all())
    # Where protection alone does not fill the budget, each head owns its guaranteed share.
    for b in range(2):
        infinite = sum(int((score[b] == torch.inf).sum()) for score in scores)
        promised = sum(min(int(budgets[b] * floor), int(n)) for live in round.live for n in live[b])
        if infinite + promised <= budgets[b] * heads:
            for n, live in zip(counts, round.live, strict=True):
                for h, owned in enumerate(n[b].tolist()):
                    assert owned >= min(int(budgets[b] * floor), int(live[b, h]))


def test_topk_is_one_ranking_over_the_scope() -> None:
    first = torch.tensor([[[9.0, 8.0, 7.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    second = torch.tensor([[[6.0, 5.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]])
    scores = [first, second]
    counts = TopK(scope=Scope.MODEL).allocate(scores, round_of(scores, [2]))
    # Eight slots in all: 9 8 7 6 5 2 1, then the first of the zeros.
    assert [n.tolist() for n in counts] == [[[4, 1]], [[2, 1]]]


def test_ties_go_to_the_earlier_head_and_slot() -> None:
    scores = [torch.zeros(1, 3, 4)]
    counts = TopK(scope=Scope.LAYER).allocate(scores, round_of(scores, [2]))
    assert counts[0].tolist() == [[4, 2, 0]]
    assert top_mask(torch.zeros(1, 4), torch.tensor([2])).tolist() == [[True, True, False, False]]


@few
@given(
    layers=st.integers(1, 40),
    mean=st.integers(1, 300),
    slots=st.integers(1, 3000),
    window=st.integers(0, 40),
    beta=st.sampled_from([1.0, 2.0, 10.0, 20.0]),
)
def test_pyramids_add_up_and_fall(
    layers: int, mean: int, slots: int, window: int, beta: float
) -> None:
    pyramid = Pyramid(beta=beta)
    budgets = [pyramid.layer_budget(i, layers, mean, slots, window) for i in range(layers)]
    assert sum(budgets) == layers * mean
    if slots <= mean or window >= mean:
        assert budgets == [mean] * layers
        return
    assert min(budgets) >= window
    assert max(budgets) <= slots + 1
    assert all(a >= b - 1 for a, b in pairwise(budgets)), "up to rounding"


@few
@given(st.data())
def test_layers_of_a_pyramid_never_hold_more_than_the_mean(data: st.DataObject) -> None:
    layers, mean, n = (data.draw(st.integers(a, b)) for a, b in ((1, 6), (1, 30), (1, 90)))
    window, H = data.draw(st.integers(0, 9)), 2
    held = 0
    for layer in range(layers):
        live = [torch.full((1, H), n)]
        # Layers are decided one by one, as the forward passes them.
        round = Round(
            budgets=torch.tensor([mean]),
            layers=(layer,),
            layer_count=layers,
            live=live,
            window=window,
        )
        counts = Pyramid(beta=5).allocate([], round)[0]
        assert bool((counts <= n).all())
        held += int(counts.sum())
    assert held <= layers * H * mean
    if n <= mean:
        assert held == layers * H * n


@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("scope", [Scope.LAYER, Scope.MODEL])
def test_protected_slots_are_counted_before_all_others(scope: Scope, floor: float) -> None:
    score = torch.full((1, 3, 6), 9.0)
    score[0, 1] = torch.tensor([torch.inf, 0.0, 0.0, 0.0, torch.inf, torch.inf])
    counts = TopK(scope=scope, floor=floor).allocate([score], round_of([score], [2]))
    # Three of six are protected in the second head; the others share three by index or floor.
    assert counts[0].tolist() == ([[3, 3, 0]] if floor == 0 else [[2, 3, 1]])


def test_a_pyramid_is_steep() -> None:
    budgets = [Pyramid(beta=20).layer_budget(i, 5, 100, 10_000, 20) for i in range(5)]
    # least = 80 / 20 = 4, most = 156, on top of the window of 20.
    assert budgets == [176, 138, 100, 62, 24]


def test_pyramid_counts_stop_at_what_there_is() -> None:
    live = torch.tensor([[50, 50], [7, 7]])
    round = Round(budgets=torch.tensor([10, 10]), layers=(0,), layer_count=2, live=[live])
    counts = Pyramid(beta=20).allocate([], round)[0]
    assert counts[0].tolist() == [19, 19]
    assert counts[1].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(scope=Scope.HEAD), "one head is Uniform"),
        (lambda: TopK(floor=1.5), "from 0 to 1"),
        (lambda: TopK(floor=-0.1), "from 0 to 1"),
        (lambda: Pyramid(beta=0.5), "1 or more"),
    ],
)
def test_impossible_allocators(make: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()  # type: ignore[operator]
