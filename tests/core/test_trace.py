"""Traces: lists of what stayed at every event, against what tables and laws say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import padded, prompt, tiny
from running import decode, kept

import kvsieve

STEPS = 9


def recipe(name: str, **options: Any) -> kvsieve.Recipe:
    return kvsieve.recipe(name, budget=10, **options)


RECIPES = {
    "g-kv": recipe("g-kv", window=3, interval=4),
    "adakv": recipe("adakv", window=3, schedule="after-prefill|each-step"),
    "laprox": recipe("laprox", window=3),
    "tova": recipe("tova"),
}


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_events_are_what_tables_hold_after_them(name: str) -> None:
    model, made = tiny("llama"), RECIPES[name]
    ids, mask = padded([prompt(30), prompt(21, seed=1)])
    with kvsieve.Cache(model, made, trace=True) as cache:
        trace = cache.session.trace
        assert trace is not None
        known = 0
        for step in range(STEPS):
            feed = ids if step == 0 else prompt(2 * STEPS, seed=7)[:, step : step + 1].expand(2, 1)
            mask = mask if step == 0 else torch.cat([mask, mask.new_ones(2, 1)], 1)
            model(feed, attention_mask=mask, past_key_values=cache)
            new = trace.events[known:]
            known = len(trace.events)
            held = kept(cache)
            for event in new:
                assert [[x.tolist() for x in row] for row in event.kept] == held[event.layer]
                assert event.seen == [30 + step, 21 + step]
                assert event.decoded == step
            if new:
                assert sorted(event.layer for event in new) == [0, 1]
        assert cache.report.events == known > 0
        assert cache.report.trace is trace


def test_visible_is_causal_but_for_what_had_gone() -> None:
    """The mask of a run is what its tables held before each forward, token by token."""
    made = RECIPES["g-kv"]
    run = decode(tiny("llama"), made, prompt(30), steps=STEPS, keep_open=True, traced=True)
    with run.cache as cache:
        trace = cache.session.trace
        assert trace is not None and len(trace.of(1)) == 3
        mask = trace.visible(1, 0, 1)
        assert mask.shape == (38, 38)
        assert mask[:30].equal(torch.ones(30, 38, dtype=torch.bool).tril())
        for t in range(30, 38):
            held = run.held[t - 30][1][0][1]
            assert mask[t].nonzero()[:, 0].tolist() == [*held, t]


def test_it_is_recorded_when_asked_for_and_survives_the_run() -> None:
    model = tiny("llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    with kvsieve.attach(model, RECIPES["g-kv"]) as run:
        model.generate(prompt(30), **options)
    assert run.report.trace is None
    with kvsieve.attach(model, RECIPES["g-kv"], trace=True) as run:
        model.generate(prompt(30), **options)
        model.generate(prompt(25), **options)
    first, second = (report.trace for report in run.reports)
    assert first is not None and second is not None
    assert first.events[0].seen == [30] and second.events[0].seen == [25]
    assert "trace" not in run.report.to_dict()
    again = json.loads(json.dumps(second.events[0].to_dict()))
    assert again["kept"] == [[head.tolist() for head in row] for row in second.events[0].kept]
    assert [len(head) for head in again["kept"][0]] == [10, 10]


def test_it_holds_lists_as_long_as_the_budget() -> None:
    made = recipe("keydiff", schedule="each-step")
    run = decode(tiny("llama"), made, prompt(60), steps=STEPS, keep_open=True, traced=True)
    with run.cache as cache:
        trace = cache.session.trace
        assert trace is not None
        heads = [head for event in trace.events for row in event.kept for head in row]
    assert len(heads) == STEPS * 2 * 2
    assert {head.dtype for head in heads} == {torch.int32}
    assert sum(head.untyped_storage().nbytes() for head in heads) == 4 * 10 * len(heads)


def test_reset_starts_a_new_trace() -> None:
    with kvsieve.Cache(tiny("llama"), RECIPES["tova"], trace=True) as cache, torch.no_grad():
        tiny("llama")(prompt(30), past_key_values=cache)
        old = cache.session.trace
        cache.reset()
        assert cache.session.trace is not None and cache.session.trace is not old
        assert cache.session.trace.events == []
