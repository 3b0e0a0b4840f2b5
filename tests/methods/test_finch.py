"""FINCH: attention of the question, by chunks, and keys that move together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, prompt, tiny
from running import kept as held
from torch import Tensor

import kvsieve
from kvsieve.errors import BudgetError, RecipeError

from .allocations import Allocations
from .support import (
    FULL,
    Row,
    Run,
    Vector,
    assert_close,
    best,
    draw,
    expected,
    kept,
    mean,
    rows,
    scores,
    table,
)

W = 3


def recipe(budget: int = 8, **options: object) -> kvsieve.Recipe:
    return kvsieve.recipe("finch", budget=budget, **{"window": W, **options})


def formula(row: Row, h: int, normalise: bool = True) -> Vector:
    """The question's attention, each query by the number of slots before it."""
    asked = range(max(0, row.n - W), row.n)
    return [
        mean(
            mean(row.attention(h, g, t)[i] * (t if normalise else 1) for t in asked)
            for g in row.groups
        )
        for i in range(row.n)
    ]


def ranked(score: Vector, chunk: int) -> Vector:
    """Each slot's rank in its chunk, the question before all others."""
    n = len(score)
    out = [0.0] * n
    for start in range(0, n, chunk):
        span = range(start, min(n, start + chunk))
        order = sorted(span, key=lambda i: (i < n - W, -score[i] if i < n - W else i))
        for place, i in enumerate(order):
            out[i] = (len(span) - place) / len(span)
    return out


@pytest.mark.parametrize("normalise", [True, False])
def test_score(normalise: bool) -> None:
    layer = draw(S=16, padding=(0, 5), angles=FULL)
    want = expected(layer, lambda row, h: formula(row, h, normalise))
    assert_close(scores(layer, recipe(normalise=normalise)), want, cut=0)


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 100])
def test_rank_in_chunks(chunk: int) -> None:
    layer = draw(S=16, padding=(0, 5), angles=FULL, seed=1)
    want = expected(layer, lambda row, h: ranked(formula(row, h), chunk))
    assert_close(scores(layer, recipe(chunk=chunk)), want)


@pytest.mark.parametrize("chunk", [0, 4])
def test_kept_set(chunk: int) -> None:
    layer = draw(S=16, padding=(0, 2), angles=FULL, seed=2)
    want = []
    for row in rows(layer):
        found = [formula(row, h) for h in row.heads]
        found = [ranked(x, chunk) for x in found] if chunk else found
        want.append([best(x, 8, range(row.n - W, row.n)) for x in found])
    assert kept(recipe(chunk=chunk), layer) == want


def test_every_chunk_keeps_the_same_share() -> None:
    layer = draw(B=1, S=40, angles=FULL, seed=3)
    for head in kept(recipe(20, chunk=10), layer)[0]:
        assert [sum(i // 10 == c for i in head) for c in range(4)] == [5, 5, 5, 5]


def test_keys_move_unless_told_otherwise() -> None:
    layer = draw(B=1, S=16, angles=FULL, seed=4)
    store = Run(recipe(), layer).store()
    assert store.standing[0].tolist() == [list(range(8, 16))] * 2
    assert recipe(rerotate=False).rerotate is False
    still = Run(recipe(rerotate=False), layer)
    assert torch.equal(still.store().standing, still.store()["position"])
    assert still.kept() == kept(recipe(), layer)


# -- the question asked after each part ------------------------------------------------------------


def attention_to(model: Any, ids: Tensor, asked: Tensor) -> Tensor:
    """Attention ``[L, H, n]`` of a question behind a text: mean over group and queries, by n_t."""
    out = model(torch.cat([ids, asked], 1), output_attentions=True)
    n, W = ids.shape[1], asked.shape[1]
    layers = []
    for weights in out.attentions:  # [1, Hq, T, T]
        by_count = weights[0, :, n:, :n] * torch.arange(n, n + W)[:, None]
        layers.append(by_count.mean(1).view(2, 2, n).mean(1))
    return torch.stack(layers)


@torch.no_grad()
def test_a_question_is_asked_behind_the_document() -> None:
    model, ids, asked = build("llama"), prompt(30), prompt(50)[:, -4:]
    made = kvsieve.recipe("finch", budget=12, question=asked[0].tolist())
    with kvsieve.Cache(model, made) as cache:
        model(ids, past_key_values=cache)
        got, seen = held(cache), cache.report.seen
    model.set_attn_implementation("eager")
    want = attention_to(model, ids, asked)
    for layer, heads in zip(want, got, strict=True):
        for score, head in zip(layer, heads[0], strict=True):
            assert head == best(score.tolist(), 12, range(26, 30))
    assert seen == [30]


@torch.no_grad()
def test_parts_are_compressed_one_by_one_and_the_question_stays() -> None:
    model, ids, asked = tiny("llama"), prompt(60), prompt(80)[:, -4:]
    made = kvsieve.recipe("finch", budget=16, question=asked[0].tolist())
    with kvsieve.Cache(model, made) as cache:
        for start in range(0, 60, 20):
            model(ids[:, start : start + 20], past_key_values=cache)
            assert all(len(head) == 16 for layer in held(cache) for head in layer[0])
        model(asked, past_key_values=cache)
        for layer in held(cache):
            for head in layer[0]:
                assert len(head) == 16 and head[-4:] == [60, 61, 62, 63]
        for layer in cache.session.layers:
            want = torch.arange(48, 64).expand(1, 2, 16)
            assert torch.equal(layer.store.standing.long(), want)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="a question has 1 token or more"):
        recipe(window=0)
    with pytest.raises(RecipeError, match="chunk=-1"):
        recipe(chunk=-1)
    with pytest.raises(BudgetError, match="leaves no room"):
        recipe(W)


def test_memory_stays_beside_the_layer() -> None:
    layer = draw(B=1, H=2, G=2, S=20_000, D=32, angles=(0.1,))
    made = kvsieve.recipe("finch", budget=2000, window=256)
    assert made.scorer is not None
    step, store = table(layer, made.scorer)
    with Allocations([*store.table.tensors(), layer.queries]) as work:
        made.scorer.score(step, store)
    whole = 2 * 2 * 256 * 20_000 * 4  # what all weights at once would take
    assert work.peak < whole // 3
