"""HashEvict: codes follow the slots, and the farthest one goes before anything is attended to."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import prompt, tiny
from torch import Tensor

import kvsieve
from kvsieve.errors import RecipeError, UnsupportedSignal
from kvsieve.hashing import code_dtype, hamming, packed, sign_bits
from kvsieve.sketch import gaussian

from .allocations import Allocations
from .support import Layer, Row, Run, dot, draw, rows, table

SINKS, RECENT, M = 2, 3, 9


def recipe(budget: int = M, **options: Any) -> kvsieve.Recipe:
    options = {"sinks": SINKS, "recent": RECENT, "bits": 12} | options
    return kvsieve.recipe("hash-evict", budget=budget, **options)


def code(x: list[float], columns: list[list[float]]) -> list[bool]:
    return [dot(x, column) >= 0 for column in columns]


def distance(a: list[bool], b: list[bool]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


class Head:
    """One KV head of the paper's loop."""

    def __init__(self, row: Row, h: int, columns: list[list[float]], source: str) -> None:
        self.row, self.h, self.columns, self.source = row, h, columns, source
        self.slots: list[int] = []

    def fill(self, n: int) -> None:
        """A prompt of n tokens: the first and the most recent ones."""
        whole = list(range(n))
        self.slots = whole if n <= M else [*whole[:SINKS], *whole[n - (M - SINKS) :]]

    def replace(self, t: int) -> None:
        """Token t takes the place of the farthest one."""
        if len(self.slots) == M:
            asked = [self.row.k[self.h][t]]
            if self.source == "query":
                asked = [q[t] for q in self.row.q[self.h]]
            far = {
                i: sum(
                    distance(code(self.row.k[self.h][i], self.columns), code(x, self.columns))
                    for x in asked
                )
                for i in self.slots
                if SINKS <= i <= t - RECENT
            }
            self.slots.remove(min(far, key=lambda i: (-far[i], i)))
        self.slots.append(t)


def simulated(layer: Layer, bits: int, source: str, lengths: tuple[int, ...]) -> list[list[Head]]:
    """The rows' heads after a prompt, of which row b has ``lengths[b]`` real tokens."""
    columns = gaussian(4, bits, seed=0).T.double().tolist()
    heads = [[Head(row, h, columns, source) for h in row.heads] for row in rows(layer)]
    for row, n in zip(heads, lengths, strict=True):
        for head in row:
            head.fill(n)
    return heads


@pytest.mark.parametrize("source", ["query", "key"])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_every_replacement_is_that_of_the_loop(source: str, layout: Any) -> None:
    layer, prefill, lengths = draw(B=3, S=40, padding=(0, 6, 15), seed=1), 20, (20, 14, 5)
    heads = simulated(layer, 12, source, lengths)
    run = Run(recipe(source=source, layout=layout), layer.part(0, prefill))
    for t in range(prefill, 40):
        run.feed(layer.part(t, t + 1))
        for row, n in zip(heads, lengths, strict=True):
            for head in row:
                head.replace(n + t - prefill)
        assert run.kept() == [[head.slots for head in row] for row in heads]
    assert any(b - a > 1 for head in run.kept()[0] for a, b in pairwise(head[SINKS:]))


def test_stored_codes_are_those_of_the_stored_keys() -> None:
    layer = draw(B=2, S=40, padding=(0, 9), seed=2)
    run = Run(recipe(bits=20), layer.part(0, 18))
    projection = gaussian(4, 20, seed=0)
    for t in range(18, 40):
        run.feed(layer.part(t, t + 1))
        store = run.store()
        assert store["code"].dtype is torch.int32
        assert torch.equal(store["code"], packed(sign_bits(store.keys, projection)))
        assert store.counts.tolist() == [[M, M]] * 2


def test_a_decode_step_attends_to_what_is_left_and_to_itself() -> None:
    layer = draw(B=1, S=24, seed=3)
    run = Run(recipe(), layer.part(0, 20))
    session, row = run.session, rows(layer)[0]
    for t in range(20, 24):
        part = layer.part(t, t + 1)
        session.begin(1, None, None)
        session.append(0, part.keys, part.values)
        out = session.attend(0, part.queries, part.scale)
        session.end()
        for h in row.heads:
            held = run.kept()[0][h]
            assert len(held) == M and held[-1] == t
            for g in row.groups:
                weights = row.attention_to(held, h, g, t)
                want = [
                    sum(w * row.v[h][i][d] for w, i in zip(weights, held, strict=True))
                    for d in range(4)
                ]
                assert out[0, h, g, 0].tolist() == pytest.approx(want, abs=1e-5)


def test_other_methods_can_act_before_attention_too() -> None:
    layer = draw(B=1, S=24, seed=4)
    early = Run(
        kvsieve.recipe("knorm", budget=6, schedule="after-prefill|before-attend"),
        layer.part(0, 20),
    )
    for t in range(20, 24):
        before = early.kept()[0]
        early.feed(layer.part(t, t + 1))
        for h, row in enumerate(early.kept()[0]):
            gone = set(before[h]) - set(row)
            assert row[-1] == t and len(row) == 6 and len(gone) == 1
            longest = max(before[h], key=lambda i: float(layer.keys[0, h, i].norm()))
            assert gone == {longest}


def test_hand_example() -> None:
    keys = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    codes, asked = (packed(sign_bits(x, torch.eye(2))) for x in (keys, torch.tensor([2.0, 1.0])))
    assert hamming(codes, asked).tolist() == [0, 1, 2]
    assert sign_bits(torch.zeros(2), torch.eye(2)).all(), "zero counts as 1"


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 16, 17, 31, 32, 33, 64])
def test_codes_of_every_width(bits: int) -> None:
    made = torch.Generator().manual_seed(bits)
    a, b = (torch.rand(5, 7, bits, generator=made) < 0.5 for _ in "ab")
    a[0, 0], b[0, 0] = True, False
    got = hamming(packed(a), packed(b))
    assert got.tolist() == (a != b).sum(-1).tolist()
    assert packed(a).dtype is code_dtype(bits)
    assert packed(a).element_size() * 8 < 2 * max(bits, 5)


def test_many_bits_measure_the_angle() -> None:
    layer, bits = draw(B=1, H=1, G=1, S=50, D=16, seed=5), 4096
    x, y = layer.keys[0, 0], layer.queries[0, 0, 0, 0]
    projection = gaussian(16, bits, seed=1)
    apart = (sign_bits(x, projection) != sign_bits(y, projection)).float().mean(-1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    assert (apart - cosine.arccos() / math.pi).abs().max() < 0.03
    wide = (cosine[:, None] - cosine).abs() > 0.15
    agree = (apart[:, None] > apart) == (cosine[:, None] < cosine)
    assert agree[wide].all() and wide.any()


def test_scale_of_keys_and_queries_and_the_signs_of_columns_change_nothing() -> None:
    layer = draw(B=2, S=30, seed=6)
    made = torch.Generator().manual_seed(7)
    stretch = torch.rand(2, 2, 30, 1, generator=made) + 0.1

    def final(x: Layer) -> Any:
        run = Run(recipe(), x.part(0, 15))
        for t in range(15, 30):
            run.feed(x.part(t, t + 1))
        return run.kept()

    want = final(layer)
    assert final(replace(layer, keys=layer.keys * stretch)) == want
    assert final(replace(layer, queries=layer.queries * 0.01)) == want
    projection = gaussian(4, 12, seed=0)
    turned = projection[:, torch.randperm(12, generator=made)] * torch.randn(12).sign()

    def apart(r: Tensor) -> Tensor:
        return hamming(
            packed(sign_bits(layer.keys, r)), packed(sign_bits(layer.queries[:, :, 0], r))
        )

    assert torch.equal(apart(turned), apart(projection))


def test_equal_keys_make_it_streaming_llm() -> None:
    layer = draw(B=1, S=30, seed=8)
    layer = replace(layer, keys=layer.keys[:, :, :1].expand_as(layer.keys).contiguous())
    run = Run(recipe(), layer.part(0, 12))
    same = Run(kvsieve.recipe("streaming-llm", budget=M, sinks=SINKS), layer.part(0, 12))
    for t in range(12, 30):
        run.feed(layer.part(t, t + 1))
        same.feed(layer.part(t, t + 1))
        assert run.kept() == same.kept()


def test_layers_and_seeds_have_projections_of_their_own() -> None:
    layer = draw(B=1, S=30, seed=9)

    def held(seed: int) -> Any:
        run = Run(recipe(seed=seed), layer.part(0, 12), layer.part(0, 12))
        for t in range(12, 30):
            run.feed(layer.part(t, t + 1), layer.part(t, t + 1))
        return run.kept(0), run.kept(1)

    assert held(0)[0] != held(0)[1]
    assert held(0) == held(0)
    assert held(0) != held(1)


def test_hashes_beside_the_layer() -> None:
    B, H, G, S, D = 1, 2, 2, 16384, 64
    layer = draw(B=B, H=H, G=G, S=S, D=D)
    scorer = recipe(bits=64).scorer
    assert scorer is not None
    with Allocations([layer.queries, layer.keys, layer.values]) as seen:
        step, store = table(layer, scorer)
        before = seen.held
        scorer.observe(step, store)
        scorer.score(replace(step, prefill=False), store)
        assert seen.peak - before < B * H * S * D * 4, "the size of the layer's keys"


def test_refuses_what_has_no_meaning() -> None:
    for bits in (0, 65):
        with pytest.raises(RecipeError, match="1 to 64 bits"):
            recipe(bits=bits)
    with pytest.raises(RecipeError, match="source='value'"):
        recipe(source="value")


@torch.no_grad()
def test_refuses_models_that_expand_what_they_cache() -> None:
    model = tiny("deepseek-v3")
    with pytest.raises(UnsupportedSignal, match="eviction before attention"):
        kvsieve.attach(model, recipe())
    with kvsieve.Cache(model, recipe(schedule="each-step", source="key")) as cache:
        model(prompt(20), past_key_values=cache)
        model(prompt(1, seed=3), past_key_values=cache)
        assert cache.session.layers[0].store.counts.max() == M
        latents = cache.session.layers[0].store.counts.shape[1] == 1
    if not latents:
        pytest.skip("older releases cache what they have expanded: keys, as of other models")
    with (
        kvsieve.Cache(model, recipe(schedule="each-step")) as cache,
        pytest.raises(UnsupportedSignal, match="caches latents"),
    ):
        model(prompt(20), past_key_values=cache)
