"""ChunkKV: whole chunks stay or go, the same in all heads of a layer."""

from __future__ import annotations

import pytest
import torch

import kvsieve
from kvsieve.compressors import KeepChunks
from kvsieve.errors import RecipeError

from .support import Layer, Run, Vector, draw, kept, mean, norm, rows, scores


def whole_chunks(
    heads: list[Vector], slots: list[int], length: int, budget: int, safe: set[int]
) -> list[int]:
    """What stays of ``slots`` (token positions) whose scores are ``heads[h][j]``."""
    total = {i: sum(head[j] for head in heads) for j, i in enumerate(slots)}
    free = [i for i in slots if i not in safe]
    chunks = {i // length for i in free}
    worth = {c: mean(total[i] for i in free if i // length == c) for c in chunks}
    order = sorted(free, key=lambda i: (-worth[i // length], i))
    return sorted([*safe, *order][:budget])


@pytest.mark.parametrize("length", [1, 4, 7, 50])
def test_kept_set_over_key_norms(length: int) -> None:
    layer = draw(H=3, S=26, padding=(0, 5))
    want = []
    for row in rows(layer):
        heads = [[-norm(k) for k in head] for head in row.k]
        want.append([whole_chunks(heads, list(range(row.n)), length, 12, set())] * 3)
    got = kept(kvsieve.recipe("chunkkv", scorer="knorm", budget=12, length=length), layer)
    assert got == want


def test_kept_set_over_snapkv_with_its_window() -> None:
    layer = draw(H=3, S=26, padding=(0, 5), seed=1)
    snap = scores(layer, kvsieve.recipe("snapkv", budget=9, window=2, kernel=3))
    want = []
    for heads in snap:
        n = len(heads[0])
        want.append([whole_chunks(heads, list(range(n)), 4, 9, {n - 2, n - 1})] * 3)
    got = kept(kvsieve.recipe("chunkkv", budget=9, window=2, kernel=3, length=4), layer)
    assert got == want


def test_hand_example() -> None:
    norms = torch.tensor([[5.0, 5.0, 1.0, 9.0, 4.0, 4.0, 2.0], [5.0, 5.0, 1.0, 7.0, 4.0, 4.0, 8.0]])
    keys = norms[None, :, :, None]
    layer = Layer(queries=torch.zeros(1, 2, 1, 7, 1), keys=keys, values=keys)
    # Means of the summed norms: 10, 9, 8 and (the short tail) 10.
    for budget, stays in ((2, [4, 5]), (3, [2, 4, 5]), (4, [2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        made = kvsieve.recipe("chunkkv", scorer="knorm", budget=budget, length=2)
        assert kept(made, layer) == [[stays, stays]]


def test_chunks_of_one_over_one_head_are_the_scorer_itself() -> None:
    layer = draw(H=1, S=20, seed=2)
    made = kvsieve.recipe("chunkkv", scorer="keydiff", budget=6, length=1)
    assert kept(made, layer) == kept(kvsieve.recipe("keydiff", budget=6), layer)


def test_a_chunk_that_was_cut_is_judged_by_what_is_left() -> None:
    layer = draw(B=1, S=25, seed=3)
    made = kvsieve.recipe("chunkkv", scorer="knorm", budget=10, length=4, interval=5)
    run = Run(made, layer.part(0, 20))
    slots = run.kept()[0][0]
    assert run.kept() == [[slots, slots]] and any(n % 4 for n in [len(slots)])
    for t in range(20, 25):
        run.feed(layer.part(t, t + 1))
    slots += range(20, 25)
    heads = [[-norm(head[i]) for i in slots] for head in rows(layer)[0].k]
    want = whole_chunks(heads, slots, 4, 10, set())
    assert run.kept() == [[want, want]]


def test_each_layer_of_a_pyramid_keeps_its_own_number() -> None:
    drawn = [draw(S=30, seed=seed) for seed in range(3)]
    options = {"budget": 12, "window": 3, "kernel": 3, "beta": 4}
    run = Run(kvsieve.recipe("chunkkv", scorer="pyramidkv", length=5, **options), *drawn)
    assert [[len(h) for h in run.kept(i)[0]] for i in range(3)] == [[18, 18], [12, 12], [6, 6]]


def test_condemned_slots_rank_above_missing_ones() -> None:
    least = torch.finfo(torch.float32).min
    given = torch.tensor([[[1.0, least, least, least, -torch.inf, 3.0]] * 2])
    got = KeepChunks(length=2).shared(given, torch.arange(6)[None, None])
    assert bool(got[..., :4].isfinite().all())
    assert bool((got[..., 4] == -torch.inf).all())
    assert got[0, 0, 5] == 3.0


def test_refuses_scorers_that_choose_their_own_way() -> None:
    for scorer in ("laprox", "full", "adakv", "criticalkv"):
        with pytest.raises(RecipeError, match="chunkkv"):
            kvsieve.recipe("chunkkv", scorer=scorer, budget=6)
    for wrapper in ("adakv", "criticalkv"):
        with pytest.raises(RecipeError, match=wrapper):
            kvsieve.recipe(wrapper, scorer="chunkkv", budget=6)
    with pytest.raises(RecipeError, match="1 token or more"):
        kvsieve.recipe("chunkkv", budget=6, window=2, length=0)
