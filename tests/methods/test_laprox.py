"""LaProx: column norm of attention times norm of the projected value, over the whole model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.session import Session

from .allocations import Allocations
from .support import (
    Layer,
    Row,
    Run,
    Vector,
    assert_close,
    draw,
    expected,
    from_attention,
    kept,
    long_layer,
    mean,
    norm,
    pooled,
    project,
    rows,
    scores,
    table,
)

W = 3


def recipe(budget: int = 7, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("laprox", budget=budget, **{"window": W, "kernel": 7, **options})


def products(
    layer: Layer, row: Row, h: int, kernel: int, gqa: str, smooth: str = "column"
) -> Vector:
    """``p`` of the slots before the window, values projected in full."""
    assert layer.w_o is not None
    matrices = layer.w_o[h].double().tolist()
    norms = [[norm(project(v, w)) for v in row.v[h]] for w in matrices]  # [G][n]
    seen = [
        [row.attention(h, g, t) for t in range(row.n - W, row.n)] for g in row.groups
    ]  # [G][W][n]
    older = range(row.n - W)
    if gqa in ("mean_attn", "sum_proj"):
        grouped = [[mean(a[w][i] for a in seen) for i in older] for w in range(W)]
        columns = [[norm(list(c)) for c in zip(*grouped, strict=True)]]
        norms = [[mean(x) for x in zip(*norms, strict=True)]]
        if gqa == "sum_proj":
            joint = [[sum(x) for x in zip(*at, strict=True)] for at in zip(*matrices, strict=True)]
            norms = [[norm(project(v, joint)) for v in row.v[h]]]
    else:
        columns = [[norm([a[i] for a in seen[g]]) for i in older] for g in row.groups]
    if smooth == "column":
        columns = [pooled(column, kernel) for column in columns]
    each = [[c * x[i] for i, c in enumerate(y)] for y, x in zip(columns, norms, strict=True)]
    merge = sum if gqa == "per_head_sum" else mean
    p = [merge(x) for x in zip(*each, strict=True)]
    return pooled(p, kernel) if smooth == "score" else p


def normalised(layer: Layer, kernel: int, gqa: str, smooth: str = "column") -> list[list[Vector]]:
    """``p`` over its sum in the layer, zeros for the window: ``[b][h][i]``."""
    p = expected(layer, lambda row, h: products(layer, row, h, kernel, gqa, smooth))
    totals = [sum(sum(head) for head in row) for row in p]
    return [
        [[x / total for x in head] + [0.0] * W for head in row]
        for row, total in zip(p, totals, strict=True)
    ]


GROUPINGS = ("mean_attn", "per_head", "per_head_sum", "sum_proj")


@pytest.mark.parametrize("smooth", ["column", "score"])
@pytest.mark.parametrize("gqa", GROUPINGS)
@pytest.mark.parametrize("kernel", [1, 7])
def test_score(gqa: str, kernel: int, smooth: str) -> None:
    layer = draw(S=18, padding=(0, 5))
    got = scores(layer, recipe(gqa=gqa, kernel=kernel, pooled=smooth))
    assert_close(got, normalised(layer, kernel, gqa, smooth), cut=W)
    for row in got:
        assert sum(sum(head[:-W]) for head in row) == pytest.approx(1.0, abs=1e-5)


def hand_layer() -> Layer:
    """Two queries' attention over three tokens (the window itself gets none), W_O = I."""
    weights = [[0.5, 0.3, 0.2, 0.0, 0.0], [0.1, 0.6, 0.3, 0.0, 0.0]]
    values = [[1.0, 0.0], [0.0, 2.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    return replace(from_attention(weights, values), w_o=torch.eye(2)[None, None])


def test_hand_example() -> None:
    layer, options = hand_layer(), {"window": 2, "kernel": 1}
    got = scores(layer, recipe(4, **options))[0][0][:3]
    assert got == pytest.approx([0.1776, 0.4673, 0.3552], abs=1e-4)
    assert kept(recipe(4, **options), layer) == [[[1, 2, 3, 4]]]
    # By attention alone, token 0 comes before token 2.
    alone = kvsieve.recipe("snapkv", budget=4, window=2, kernel=1)
    assert kept(alone, layer) == [[[0, 1, 3, 4]]]


def test_one_query_head_per_group_makes_the_group_rules_alike() -> None:
    layer = draw(G=1, S=16, seed=1)
    for gqa in GROUPINGS:
        assert_close(scores(layer, recipe(gqa=gqa)), scores(layer, recipe()), cut=W)


@pytest.mark.parametrize("gqa", GROUPINGS)
def test_without_the_layer_s_sum_louder_layers_keep_more(gqa: str) -> None:
    layers = [draw(S=18, seed=seed) for seed in (12, 13)]
    want = expected(layers[0], lambda row, h: products(layers[0], row, h, 7, gqa))
    padded = [[[*head, *[0.0] * W] for head in row] for row in want]
    assert_close(scores(layers[0], recipe(gqa=gqa, normalise=False)), padded, cut=W)
    assert layers[1].w_o is not None
    louder = [layers[0], replace(layers[1], w_o=layers[1].w_o * 50)]
    assert Run(recipe(gqa=gqa), *louder).kept() == Run(recipe(gqa=gqa), *layers).kept()
    unequal = Run(recipe(gqa=gqa, normalise=False), *louder)
    held = [sum(len(head) for head in unequal.kept(i)[0]) for i in (0, 1)]
    assert held == [2 * W, 4 * 7 - 2 * W]  # the quiet layer has nothing but its window


def test_sum_proj_is_exact_where_a_group_s_heads_attend_alike() -> None:
    """Its p is the norm of what one slot adds to the output of the window's queries."""
    layer = draw(B=1, H=1, G=3, S=12, seed=14)
    layer.queries.copy_(layer.queries[:, :, :1].clone())
    assert layer.w_o is not None
    row, w_o = rows(layer)[0], layer.w_o[0].double()
    weights = torch.tensor([row.attention(0, 0, t) for t in range(12 - W, 12)])
    values = torch.tensor(row.v[0])
    weights, values = weights.double(), values.double()
    want = [
        float(sum(weights[:, i, None] * (values[i] @ w_o[g]) for g in range(3)).norm())
        for i in range(12 - W)
    ]
    got = scores(layer, recipe(gqa="sum_proj", kernel=1, normalise=False))[0][0]
    assert got[:-W] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("gqa", GROUPINGS)
def test_blocks_change_nothing(gqa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw(S=18, padding=(0, 5), seed=15)
    want, cut = scores(layer, recipe(gqa=gqa)), []

    def small(table: torch.Tensor) -> int:
        cut.append(table.numel())
        return 2 * 2 * 18  # one query or a few slots at a time

    monkeypatch.setattr("kvsieve.scoring.layer_block", small)
    assert_close(scores(layer, recipe(gqa=gqa)), want, cut=W)
    assert len(cut) == 2


@pytest.mark.parametrize("gqa", GROUPINGS)
def test_scoring_32k_slots_takes_less_than_the_layer(gqa: str) -> None:
    """Whole, the window's attention alone would be as large as the layer's keys and values."""
    layer = long_layer(G=2, queries=32, seed=16)
    scorer = kvsieve.recipe("laprox", budget=1000, gqa=gqa).scorer
    assert scorer is not None
    step, store = table(layer, scorer)
    # The prompt's other queries are gone; positions of the 32 that are left are the last ones.
    step = replace(step, positions=step.positions[:, -32:])
    with Allocations([*store.table.tensors(), layer.queries]) as made_here:
        score = scorer.score(step, store)
    assert score.shape == layer.keys.shape[:3]
    assert made_here.peak <= 4 * (layer.keys.numel() + layer.values.numel())
    assert made_here.held <= 2 * 4 * score.numel()


def test_queries_do_not_pile_up_while_the_model_is_scored() -> None:
    """A layer that waits for the decision holds its table and its scores, not its queries."""
    B, H, G, S, D, layers = 1, 2, 6, 512, 16, 5
    infos = [draw(H=H, G=G, D=D, S=4).info(i) for i in range(layers)]
    session = Session(recipe(100), infos)
    session.begin(S, None, None)
    table_bytes = 4 * 2 * B * H * S * D
    held = []
    with Allocations() as made_here:
        for i in range(layers - 1):
            session.append(i, torch.randn(B, H, S, D), torch.randn(B, H, S, D))
            session.attend(i, torch.randn(B, H, G, S, D), 0.25)
            held.append(made_here.held)
    for before, after in pairwise(held):
        # Twice the table: it has a 16th of spare room, scores and remembered queries beside it.
        assert after - before < 2 * table_bytes < 4 * B * H * G * S * D


def test_turning_and_scaling_the_output_changes_nothing() -> None:
    layer = draw(S=16, seed=2)
    assert layer.w_o is not None
    want = scores(layer, recipe())
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    for w_o in (layer.w_o @ rotation, layer.w_o * 37.0):
        assert_close(scores(replace(layer, w_o=w_o), recipe()), want, cut=W)


def test_scaling_one_head_s_output_changes_its_share() -> None:
    layer = draw(B=1, H=2, S=16, seed=4)
    assert layer.w_o is not None
    before = scores(layer, recipe())[0]
    louder = layer.w_o * torch.tensor([3.0, 1.0])[:, None, None, None]
    after = scores(replace(layer, w_o=louder), recipe())[0]
    odds = [sum(row[0][:-W]) / sum(row[1][:-W]) for row in (before, after)]
    assert odds[1] == pytest.approx(3 * odds[0], rel=1e-4)


def test_equal_values_one_query_and_no_pooling_order_as_snapkv() -> None:
    layer = draw(S=16, seed=5)
    layer = replace(
        layer, values=layer.values.sign(), w_o=torch.eye(4).expand(2, 2, 4, 4).contiguous()
    )
    options = {"window": 1, "kernel": 1}
    want = kept(kvsieve.recipe("snapkv", budget=6, **options), layer)
    assert kept(recipe(6, scope="head", **options), layer) == want


@pytest.mark.parametrize("scope", ["model", "layer", "head"])
def test_kept_sets_of_three_layers(scope: str) -> None:
    budget, layers = 7, [draw(S=18, H=2, padding=(0, 4), seed=seed) for seed in (6, 7, 8)]
    run = Run(recipe(budget, scope=scope), *layers)
    got = [run.kept(ordinal) for ordinal in range(3)]
    want = [normalised(layer, 7, "mean_attn") for layer in layers]
    for b, n in enumerate((18, 14)):
        entries = [
            (want[x][b][h][i], x, h, i) for x in range(3) for h in range(2) for i in range(n - W)
        ]
        for x in range(3):
            for h in range(2):
                pool = [e for e in entries if scope == "model" or e[1] == x]
                pool = [e for e in pool if scope != "head" or e[2] == h]
                pool.sort(key=lambda e: (-e[0], *e[1:]))
                room = (budget - W) * {"model": 6, "layer": 2, "head": 1}[scope]
                stay = sorted(e[3] for e in pool[:room] if e[1:3] == (x, h))
                assert got[x][b][h] == [*stay, *range(n - W, n)]
        assert sum(len(got[x][b][h]) for x in range(3) for h in range(2)) == 3 * 2 * budget


def test_one_layer_is_the_layer_scope() -> None:
    layer = draw(S=18, seed=9)
    assert kept(recipe(scope="model"), layer) == kept(recipe(scope="layer"), layer)


def test_error_of_the_output_is_smaller_than_by_attention_alone() -> None:
    """Over 100 rows, ``||A V - A_kept V_kept||_F`` of both rankings."""
    layer = draw(B=100, H=1, G=1, S=24, seed=10)
    made = torch.Generator().manual_seed(11)
    layer.values.mul_(torch.randn(100, 1, 24, 1, generator=made).exp())
    layer = replace(layer, w_o=torch.eye(4)[None, None])
    errors = {}
    for name in ("laprox", "snapkv"):
        stays = kept(kvsieve.recipe(name, budget=8, window=W, kernel=1), layer)
        errors[name] = 0.0
        for row, heads in zip(rows(layer), stays, strict=True):
            weights = torch.tensor([row.attention(0, 0, t) for t in range(24 - W, 24)])
            values = torch.tensor(row.v[0])
            part = weights[:, heads[0]] @ values[heads[0]]
            errors[name] += float((weights @ values - part).norm())
    assert errors["laprox"] < errors["snapkv"]


@pytest.mark.parametrize(
    "wrong", [{"gqa": "sum"}, {"scope": "row"}, {"pooled": "both"}, {"kernel": 4}]
)
def test_refuses_what_has_no_meaning(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        recipe(**wrong)
