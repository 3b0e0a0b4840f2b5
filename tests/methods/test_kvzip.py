"""KVzip: the highest attention that a slot gets while the context is repeated."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.methods.kvzip import Reconstruction
from kvsieve.session import Session
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store

from .support import Layer, Row, Vector, assert_close, dot, draw, rows, softmax


def formula(context: Row, fed: Row, h: int, span: tuple[int, int], sinks: int) -> Vector:
    """Scores of one chunk: softmax over sinks before it, its slots, and the fed tokens so far."""
    start, end = span
    slots = [*range(min(sinks, start)), *range(start, end)]
    out = [0.0] * context.n
    for g in fed.groups:
        for t, query in enumerate(fed.q[h][g]):
            keys = [context.k[h][i] for i in slots] + fed.k[h][: t + 1]
            weights = softmax([dot(query, k) * context.scale for k in keys])
            for i, weight in zip(slots, weights, strict=False):
                if i >= start:
                    out[i] = max(out[i], weight)
    return out


def replayed(
    context: Layer, rounds: list[tuple[Layer, list[tuple[int, int]]]], sinks: int
) -> Tensor:
    """Scores ``[B, H, S]`` after each round's tokens were fed and dropped again."""
    scorer = Reconstruction(sinks=sinks)
    store = Store(scorer.columns)
    positions = store.append(context.keys, context.values, context.live)
    step = Step(
        layer=LayerInfo(ordinal=0),
        query=context.queries,
        scale=context.scale,
        positions=positions,
        live=context.live,
        prefill=True,
    )
    scorer.observe(step, store)
    for fed, spans in rounds:
        mark = store.mark()
        positions = store.append(fed.keys, fed.values, fed.live)
        step = Step(
            layer=LayerInfo(ordinal=0),
            query=fed.queries,
            scale=fed.scale,
            positions=positions,
            live=fed.live,
            replayed=torch.tensor(spans),
        )
        scorer.observe(step, store)
        store.rollback(mark)
    return scorer.score(step, store)


def best_of(rounds: list[Vector]) -> Vector:
    return [max(x) for x in zip(*rounds, strict=True)]


@pytest.mark.parametrize("sinks", [0, 2, 8])
def test_score_over_two_chunks(sinks: int) -> None:
    context = draw(S=12)
    feeds = [(draw(S=7, seed=1), (0, 6)), (draw(S=9, seed=2), (6, 12))]
    got = replayed(context, [(fed, [span, span]) for fed, span in feeds], sinks)
    want = [
        [
            best_of([formula(row, rows(fed)[b], h, span, sinks) for fed, span in feeds])
            for h in row.heads
        ]
        for b, row in enumerate(rows(context))
    ]
    assert_close(got.double().tolist(), want)


def test_rows_of_unlike_length() -> None:
    context = draw(S=12, padding=(0, 5))
    fed = draw(S=8, seed=3)
    fed = Layer(
        queries=fed.queries,
        keys=fed.keys,
        values=fed.values,
        live=torch.arange(8) < torch.tensor([[8], [4]]),  # padding on the right
    )
    spans = [(4, 10), (3, 7)]
    got = replayed(context, [(fed, spans)], sinks=2)
    for b, (row, n) in enumerate(zip(rows(context), (12, 7), strict=True)):
        want = [formula(row, rows(fed)[b], h, spans[b], 2) for h in row.heads]
        assert_close([got[b, :, 12 - n :].double().tolist()], [want])


def test_more_queries_never_lower_a_score() -> None:
    context, fed = draw(S=12), draw(S=9, seed=4)
    fewer = replayed(context, [(fed.part(0, 5), [(4, 12)] * 2)], sinks=2)
    more = replayed(context, [(fed, [(4, 12)] * 2)], sinks=2)
    again = replayed(context, [(fed, [(4, 12)] * 2), (draw(S=3, seed=5), [(4, 12)] * 2)], sinks=2)
    assert bool((more >= fewer).all()) and bool((more > fewer).any())
    assert bool((again >= more).all()) and bool((again > more).any())
    assert not fewer[:, :, :4].any()  # slots before the chunk get nothing


def test_a_slot_that_a_query_reads_alone_scores_one() -> None:
    context, fed = draw(B=1, S=12), draw(B=1, S=3, seed=6)
    fed.queries[0, 1, 0, 1] = context.keys[0, 1, 7] * 1000
    context.keys[0, 1, 7] *= 10
    got = replayed(context, [(fed, [(4, 12)])], sinks=2)
    assert float(got[0, 1, 7]) == pytest.approx(1.0, abs=1e-6)


@dataclass
class Toy:
    """A model of L layers without depth: a token's queries and keys depend on its id alone."""

    tables: list[Layer]  # one row of as many tokens as there are ids

    def layer(self, ordinal: int, ids: Tensor) -> Layer:
        whole = self.tables[ordinal]
        pick = torch.stack
        return Layer(
            queries=pick([whole.queries[0][:, :, row] for row in ids]),
            keys=pick([whole.keys[0][:, row] for row in ids]),
            values=pick([whole.values[0][:, row] for row in ids]),
        )

    def forward(self, session: Session, ids: Tensor, live: Tensor | None = None) -> None:
        session.begin(ids.shape[1], live, None, ids)
        for ordinal in range(len(self.tables)):
            x = self.layer(ordinal, ids)
            session.append(ordinal, x.keys, x.values)
            session.attend(ordinal, x.queries, x.scale)
        session.end(lambda again, positions: self.forward(session, again))


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_a_session_repeats_the_prompt_in_chunks(scope: str) -> None:
    toy = Toy([draw(B=1, H=2, S=40, seed=7), draw(B=1, H=2, S=40, seed=8)])
    made = kvsieve.recipe(
        "kvzip", budget=5, chunk=5, overlap=2, sinks=2, repeat_ids=[30, 31, 32], scope=scope
    )
    lengths = (13, 9)  # row 1 is padded at the left
    ids = torch.stack([torch.arange(13), torch.arange(29, 16, -1)])
    live = torch.arange(13) >= 13 - torch.tensor(lengths)[:, None]
    session = Session(made, [LayerInfo(ordinal=i) for i in range(2)])
    toy.forward(session, ids, live)
    for b, n in enumerate(lengths):
        prompt = ids[b][13 - n :]
        want = [one_row(toy, prompt, ordinal) for ordinal in range(2)]
        entries = sorted(
            (i >= 2, -want[x][h][i], x, h, i) for x in range(2) for h in range(2) for i in range(n)
        )
        for x in range(2):
            store = session.layers[x].store
            for h in range(2):
                pool = [e for e in entries if scope == "model" or e[2] == x]
                stay = sorted(
                    e[4] for e in pool[: 5 * 2 * (2 if scope == "model" else 1)] if e[2:4] == (x, h)
                )
                assert store["position"][b, h, : store.counts[b, h]].tolist() == stay


@pytest.mark.parametrize(("floor", "least"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_a_floor_leaves_every_head_a_share(floor: float, least: int) -> None:
    """One head's keys are read by nothing: its scores are the lowest of the model."""
    toy = Toy([draw(B=1, H=2, S=40, seed=7), draw(B=1, H=2, S=40, seed=8)])
    toy.tables[0].keys[0, 0] = 0
    toy.tables[1].keys.mul_(4.0)
    made = kvsieve.recipe("kvzip", budget=6, chunk=5, overlap=2, sinks=0, floor=floor)
    session = Session(made, [LayerInfo(ordinal=i) for i in range(2)])
    toy.forward(session, torch.arange(20)[None])
    counts = [layer.store.counts[0].tolist() for layer in session.layers]
    assert sum(map(sum, counts)) == 4 * 6
    assert counts[0][0] == least == min(map(min, counts))


def one_row(toy: Toy, prompt: Tensor, ordinal: int) -> list[Vector]:
    """Scores of a prompt, head by head."""
    request, n = torch.tensor([30, 31, 32]), len(prompt)
    context = rows(toy.layer(ordinal, prompt[None]))[0]
    out = []
    for h in context.heads:
        rounds = []
        for start in range(0, n, 5):
            fed = torch.cat([request, prompt[max(0, start - 2) : start], prompt[start : start + 5]])
            row = rows(toy.layer(ordinal, fed[None]))[0]
            rounds.append(formula(context, row, h, (start, min(start + 5, n)), 2))
        out.append(best_of(rounds))
    return out
