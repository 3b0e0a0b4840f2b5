"""DuoAttention: heads in order of their gates keep everything, the others their ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvsieve
from kvsieve.errors import BudgetError, RecipeError, UnsupportedLayout, UnsupportedSignal
from kvsieve.interfaces import Round
from kvsieve.shares import RetrievalHeads

from .calibrated import given
from .support import Layer, Run, draw

SINKS, RECENT = 2, 3
ENDS = SINKS + RECENT
GATES = torch.tensor([[0.2, 0.9], [0.5, 0.5], [0.0, 1.0]])  # [L, H]


def recipe(budget: int | float, gates: torch.Tensor = GATES, **options: object) -> kvsieve.Recipe:
    sizes = {"sinks": SINKS, "recent": RECENT, "stats": given(head_gate=gates)}
    return kvsieve.recipe("duo-attention", budget=budget, **{**sizes, **options})


def layers(*, S: int = 16, padding: tuple[int, ...] = ()) -> list[Layer]:
    return [draw(S=S, padding=padding, seed=i) for i in range(3)]


def held(n: int, budget: int) -> list[list[list[int]]]:
    """Walk down the gates and give every head all that is left, ``[layer][head]``."""
    heads = [(layer, h) for layer in range(3) for h in range(2)]
    order = sorted(heads, key=lambda x: (-GATES[x], x))
    left = 6 * (budget - ENDS)
    out = [[[], []] for _ in range(3)]
    for layer, h in order:
        far = min(left, n - ENDS)
        left -= far
        out[layer][h] = [*range(SINKS), *range(n - RECENT - far, n)]
    return out


@pytest.mark.parametrize("budget", [6, 8, 9, 12, 15])
def test_kept_set(budget: int) -> None:
    run = Run(recipe(budget), *layers(padding=(0, 4)))
    for b, n in enumerate((16, 12)):
        want = held(n, budget) if n > budget else [[[*range(n)]] * 2] * 3
        assert [run.kept(i)[b] for i in range(3)] == want
    assert sum(len(x) for i in range(3) for x in run.kept(i)[0]) == 6 * budget


def test_a_share_that_pays_for_whole_heads_cuts_none() -> None:
    """Three of six heads whole, three at their ends: what the paper's threshold would give."""
    run = Run(recipe((3 * 17 + 3 * ENDS) // 6), *layers(S=17))
    whole = [[len(x) == 17 for x in run.kept(i)[0]] for i in range(3)]
    # Two gates of 0.5 tie: the earlier head is whole.
    assert whole == [[False, True], [True, False], [False, True]]
    assert all(len(x) in (17, ENDS) for i in range(3) for x in run.kept(i)[0])


def test_layers_are_cut_one_by_one() -> None:
    assert recipe(8).scope.value == "head"


def test_while_decoding_streaming_heads_stay_short_and_retrieval_heads_grow() -> None:
    drawn = [draw(B=1, S=30, seed=i) for i in range(3)]
    share = 0.6
    run = Run(recipe(share, interval=4), *(x.part(0, 16) for x in drawn))
    want = held(16, int(share * 16))
    for n in (20, 24, 28):
        for t in range(n - 4, n):
            run.feed(*(x.part(t, t + 1) for x in drawn))
        # What a head lost when it was on the line doesn't come back.
        there = [[[*x, *range(n - 4, n)] for x in heads] for heads in want]
        want = [
            [[i for i in x if i in y] for x, y in zip(*heads, strict=True)]
            for heads in zip(there, held(n, int(share * n)), strict=True)
        ]
        assert [run.kept(i)[0] for i in range(3)] == want
    assert want[2][1] == list(range(28)) and want[2][0] == held(28, 6)[2][0]
    run.feed(*(x.part(28, 29) for x in drawn))
    assert len(run.kept(0)[0][0]) == ENDS + 1


def test_a_later_turn_counts_anew() -> None:
    drawn = [draw(B=1, S=30, seed=i) for i in range(3)]
    run = Run(recipe(9), *(x.part(0, 16) for x in drawn))
    run.feed(*(x.part(16, 30) for x in drawn))
    got = [run.kept(i)[0] for i in range(3)]
    assert got[2][1] == held(30, 9)[2][1]
    assert sum(len(x) for heads in got for x in heads) <= 6 * 9
    assert all(set(range(SINKS)) | set(range(27, 30)) <= set(x) for heads in got for x in heads)


def test_protected_spans_stay_in_streaming_heads_too() -> None:
    run = Run(recipe(10, protect=[(5, 7)]), *layers())
    heads = [x for i in range(3) for x in run.kept(i)[0]]
    assert all({0, 1, 5, 6, 13, 14, 15} <= set(x) for x in heads)
    assert sum(map(len, heads)) == 60


def test_counts_of_uneven_rows() -> None:
    made = RetrievalHeads(statistics=given(head_gate=torch.tensor([[0.1, 0.2]])))
    scores = torch.zeros(2, 2, 10)
    scores[:, :, :4] = torch.inf
    round = Round(
        budgets=torch.tensor([6, 6]),
        layers=(0,),
        layer_count=1,
        live=[torch.tensor([[10, 10], [5, 3]])],
        seen=torch.tensor([10, 10]),
    )
    assert made.allocate([scores], round)[0].tolist() == [[4, 8], [4, 3]]


def test_a_pattern_file(tmp_path: Path) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    lines = ["\t".join(f"{x:.10f}" for x in row) for row in GATES.tolist()]
    path.write_text("\n".join(lines), "utf-8")
    by_file = Run(recipe(9, stats=None, pattern=path), *layers())
    by_stats = Run(recipe(9), *layers())
    assert [by_file.kept(i) for i in range(3)] == [by_stats.kept(i) for i in range(3)]


def test_refusals() -> None:
    with pytest.raises(UnsupportedSignal, match=r"'duo-attention' needs statistics.*calibrate"):
        Run(recipe(9, stats=None), *layers())
    with pytest.raises(UnsupportedSignal, match="has 2 layers; the model has more"):
        Run(recipe(9, GATES[:2]), *layers())
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(ENDS)
    with pytest.raises(UnsupportedLayout, match="unequal numbers of slots"):
        recipe(9, layout="dense")
    for wrapper in ("adakv", "chunkkv"):
        with pytest.raises(RecipeError, match=wrapper):
            kvsieve.recipe(wrapper, scorer="duo-attention", budget=600)
