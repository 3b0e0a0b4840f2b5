"""Fair eviction: quotas by span, and the choice they make, against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvsieve
from kvsieve.allocators import top_mask
from kvsieve.errors import RecipeError
from kvsieve.fairness import fair_quotas, fair_scores, span_tokens


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
def test_quotas_are_exact_and_within_one_slot_of_fair(sizes: list[int], data: Any) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    quotas = fair_quotas(torch.tensor([sizes]), torch.tensor([[count]]))[0, 0].tolist()
    assert sum(quotas) == count
    for quota, size in zip(quotas, sizes, strict=True):
        assert 0 <= quota <= size
        assert abs(quota - count * size / sum(sizes)) < 1
    for a, x in zip(quotas, sizes, strict=True):
        for b, y in zip(quotas, sizes, strict=True):
            assert abs(a / x - b / y) < 1 / x + 1 / y


def test_span_tokens_follow_what_has_been_seen() -> None:
    seen = torch.tensor([20, 8, 2])
    found = span_tokens(seen, [(3, 9), (10, 15)])
    assert found.tolist() == [[6, 5, 9], [5, 0, 3], [0, 0, 2]]


def chosen_by_loop(
    scores: list[float], positions: list[int], seen: int, count: int, spans: list[tuple[int, int]]
) -> set[int]:
    """The best of each span up to its quota, then the best of what is left."""
    sizes = [min(end, seen) - min(start, seen) for start, end in spans]
    sizes.append(seen - sum(sizes))
    exact = [count * size / seen for size in sizes]
    quotas = [int(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda j: (-(exact[j] - quotas[j]), j))
    for j in order[: count - sum(quotas)]:
        quotas[j] += 1
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    best = [i for i in best if scores[i] != -float("inf")]
    kept = {i for i in best if scores[i] == float("inf")}
    for j, quota in enumerate(quotas):
        start, end = spans[j] if j < len(spans) else (-1, -1)
        inside = [
            i for i in best
            if (start <= positions[i] < end if j < len(spans)
                else not any(a <= positions[i] < b for a, b in spans))
        ]  # fmt: skip
        kept |= set(inside[:quota])
    rest = [i for i in best if i not in kept]
    first = sorted(kept, key=lambda i: (-scores[i], i))[:count]
    return set([*first, *rest][:count])


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_a_loop(seed: int) -> None:
    torch.manual_seed(seed)
    seen, count, spans = 40, 9 + seed % 8, [(2, 12), (30, 36)]
    positions = torch.randperm(seen)[:30].sort().values
    scores = torch.randint(-3, 4, (1, 2, 30)).float() / 3
    scores[:, :, 4] = torch.inf
    scores[:, 1, 7] = -torch.inf
    counts = torch.full((1, 2), count)
    fair = fair_scores(scores, positions[None, None], torch.tensor([seen]), counts, spans)
    mask = top_mask(fair, counts)
    for head in range(2):
        kept = set(mask[0, head].nonzero().flatten().tolist())
        wanted = chosen_by_loop(scores[0, head].tolist(), positions.tolist(), seen, count, spans)
        assert kept == wanted
    assert fair[0, 0, 4] == torch.inf and fair[0, 1, 7] == -torch.inf


def test_what_a_span_lacks_goes_to_the_best_of_the_others() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7]]])
    positions = torch.tensor([[[0, 10, 11, 12]]])  # of the first span's 10 tokens, one is left
    counts = torch.tensor([[3]])
    fair = fair_scores(scores, positions, torch.tensor([13]), counts, [(0, 10)])
    assert top_mask(fair, counts)[0, 0].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "spans", "message"),
    [
        ("keydiff", [(0, 5), (4, 8)], "overlap"),
        ("keydiff", [(5, 5)], "start < end"),
        ("keydiff", [5], "give a list of spans"),
        ("criticalkv", [(0, 5)], "equal shares"),
        ("chunkkv", [(0, 5)], "equal shares"),
    ],
)
def test_spans_that_make_no_sense(name: str, spans: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kvsieve.recipe(name, budget=64, fair=spans)


def test_a_recipe_with_spans_survives_its_plain_form() -> None:
    recipe = kvsieve.recipe("keydiff", budget=0.5, fair=[(0, 5), (5, 9)])
    assert recipe.fair == ((0, 5), (5, 9))
    assert kvsieve.Recipe.from_dict(recipe.to_dict()).fair == recipe.fair
