"""Scores, carried scores and kept sets of microsoft/G-KV, setting by setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.compressors import Evict
from kvsieve.scoring import redundancy
from kvsieve.session import Session
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store

from .recorded import Recorded, forward, held, load, positions_of

INTERVAL, BUDGET, PADDING, N = 13, 29, 6, 93

GKV: dict[str, Any] = {"window": 8, "decay": 0.8, "importance": 0.5}
RKV: dict[str, Any] = {"window": 8, "kernel": 5, "importance": 0.1}
H2O: dict[str, Any] = {"window": 1, "importance": 1.0, "smoothing": "sum"}

# setting -> the recipe that computes it here
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gkv": ("g-kv", GKV),
    "gkv_mean": ("g-kv", GKV | {"smoothing": "mean"}),
    "gkv_pooled": ("g-kv", GKV | {"kernel": 5}),
    "gkv_unnormalised": ("g-kv", GKV | {"normalise": False}),
    "gkv_ratio": ("g-kv", GKV | {"ratio": 0.5}),
    "gkv_padded": ("g-kv", GKV),
    "rkv": ("r-kv", RKV),
    "rkv_padded": ("r-kv", RKV),
    "snapkv": ("r-kv", RKV | {"importance": 1.0}),
    "h2o": ("g-kv", H2O | {"decay": 0.8}),
    "h2o_full": ("g-kv", H2O | {"decay": 1.0}),
}
EVENTS = [
    (setting, event)
    for setting in SETTINGS
    for event in range(5)
    if f"{setting}.event{event}.slots" in load("gkv")[0]
]


def recipe_of(setting: str) -> kvsieve.Recipe:
    method, options = SETTINGS[setting]
    return kvsieve.recipe(method, budget=BUDGET, interval=INTERVAL, **options)


def tokens(setting: str) -> Recorded:
    """Return the stream of tokens that all settings share."""
    tensors, header = load("gkv")
    live = None
    if header["settings"][setting]["padded"]:
        live = torch.ones(2, N, dtype=torch.bool)
        live[1, :PADDING] = False
    key = tensors["key"]
    return Recorded(
        query=tensors["query"],
        key=key,
        value=torch.zeros_like(key),
        scale=key.shape[-1] ** -0.5,
        info=LayerInfo(ordinal=0),
        live=live,
    )


def at_event(setting: str, event: int, recipe: kvsieve.Recipe) -> tuple[Step, Store, Tensor]:
    """Return the cache as recorded before an event, with its carried scores, and the slots."""
    tensors, header = load("gkv")
    assert recipe.scorer is not None
    now = header["settings"][setting]["prompt"] + INTERVAL * event
    slots = tensors[f"{setting}.event{event}.slots"].long()
    passed = tokens(setting).part(0, now)
    store = Store(recipe.scorer.columns)
    positions = store.append(passed.key, passed.value, passed.live)
    if slots.shape[-1] < now:
        store.keep(slots, torch.full(slots.shape[:2], slots.shape[-1]))
    old = tensors.get(f"{setting}.event{event}.score_old")
    if old is not None:
        carried = torch.full(slots.shape, -1.0)
        carried[..., : old.shape[-1]] = old
        store["global"] = carried
    recent = slice(now - recipe.scorer.window, now)
    step = Step(
        layer=passed.info,
        query=passed.query[:, :, :, recent],
        scale=passed.scale,
        positions=positions[:, recent],
        live=None if passed.live is None else passed.live[:, recent],
    )
    return step, store, slots


def real(setting: str, slots: Tensor) -> Tensor:
    """Mark the slots that are no padding."""
    live = tokens(setting).live
    if live is None:
        return torch.ones_like(slots, dtype=torch.bool)
    return live[:, None].expand(-1, slots.shape[1], -1).gather(2, slots)


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("setting", "event"), EVENTS)
def test_scores_at_each_event(setting: str, event: int) -> None:
    tensors, recipe = load("gkv")[0], recipe_of(setting)
    step, store, slots = at_event(setting, event, recipe)
    assert recipe.scorer is not None
    got = recipe.scorer.score(step, store)
    m = slots.shape[-1] - recipe.scorer.window
    there = real(setting, slots)[..., :m]
    recorded = {x: tensors[f"{setting}.event{event}.{x}"] for x in ("score", "final")}
    assert_near(got[..., :m][there], recorded["final"][there])
    if recipe.method == "g-kv":
        assert_near(store["global"][..., :m][there], recorded["score"][there])
        assert bool((store["global"][..., m:] == -1).all())


REPEATED = [(s, e) for s, e in EVENTS if f"{s}.event{e}.redundancy" in load("gkv")[0]]


@pytest.mark.parametrize(("setting", "event"), REPEATED)
def test_redundancy(setting: str, event: int) -> None:
    _, store, _ = at_event(setting, event, recipe_of(setting))
    want = load("gkv")[0][f"{setting}.event{event}.redundancy"]
    torch.testing.assert_close(redundancy(store, 0.5), want, rtol=1e-5, atol=1e-7)


def protected(scores: Tensor, store: Store, window: int) -> Tensor:
    """Window slots stay, slots that do not exist go."""
    recent = store["position"] >= (store.seen - window)[:, None, None]
    scores = scores.masked_fill(recent, torch.inf)
    return scores if store.live is None else scores.masked_fill(~store.live, -torch.inf)


def at_positions(kept: Tensor, setting: str) -> Tensor:
    """Turn a peer's list of kept slots into a mask over positions among real tokens."""
    shift = torch.zeros(2, 1, 1, dtype=torch.int64)
    if load("gkv")[1]["settings"][setting]["padded"]:
        shift[1] = PADDING
    mask = torch.zeros(*kept.shape[:2], N, dtype=torch.bool)
    return mask.scatter(2, kept.long() - shift, True)


@pytest.mark.parametrize(("setting", "event"), EVENTS)
def test_kept_set_at_each_event(setting: str, event: int) -> None:
    """From the recorded cache, as many as the peer keeps."""
    tensors, recipe = load("gkv")[0], recipe_of(setting)
    step, store, slots = at_event(setting, event, recipe)
    assert recipe.scorer is not None
    scores = protected(recipe.scorer.score(step, store), store, recipe.scorer.window)
    kept = tensors[f"{setting}.event{event}.kept"]
    counts = torch.full(kept.shape[:2], kept.shape[-1])
    Evict().compress(step, store, scores, counts)
    got, want = positions_of(store, N), at_positions(kept, setting)
    if setting == "snapkv":  # exact ties: the scores of what stays are the same, not the slots
        by_position = torch.full((2, 2, N), -1.0).scatter(2, slots, scores)
        same = [by_position[x].view(2, 2, -1).sort(-1).values for x in (got, want)]
        assert_near(same[0], same[1])
    else:
        assert torch.equal(got, want)


RUNS = ["gkv", "gkv_mean", "gkv_pooled", "gkv_padded", "rkv", "rkv_padded", "h2o"]
RUNS += ["gkv_ratio", "gkv_unnormalised"]


@pytest.mark.parametrize("setting", RUNS)
def test_a_whole_run_keeps_what_the_peer_keeps(setting: str) -> None:
    """A prompt of 41 and 52 decode steps: the carried state is kvsieve's own throughout."""
    tensors, stream = load("gkv")[0], tokens(setting)
    session = Session(recipe_of(setting), [stream.info])
    forward(session, [stream.part(0, 41)])
    for event in range(5):
        want = at_positions(tensors[f"{setting}.event{event}.kept"], setting)
        assert torch.equal(held(session, N)[0], want), f"event {event}"
        new = tensors.get(f"{setting}.event{event}.score_new")
        if new is not None:
            store = session.layers[0].store
            assert_near(store["global"][..., : new.shape[-1]], new)
        if event < 4:
            for t in range(41 + INTERVAL * event, 41 + INTERVAL * (event + 1)):
                forward(session, [stream.part(t, t + 1)])


# -- where kvsieve differs by decision -----------------------------------------------------------


def test_h2o_averages_over_the_group_where_the_peer_takes_the_maximum() -> None:
    """The prompt's sums: with the maximum they are the peer's, with the mean they are kvsieve's."""
    want = load("gkv")[0]["h2o_full.initial_score"]
    prompt = tokens("h2o_full").part(0, 24)
    recipe = kvsieve.recipe("h2o", budget=12)
    assert recipe.scorer is not None
    store = Store(recipe.scorer.columns)
    positions = store.append(prompt.key, prompt.value)
    step = Step(
        layer=prompt.info,
        query=prompt.query,
        scale=prompt.scale,
        positions=positions,
        prefill=True,
    )
    weights = step.attention(store)  # [B, H, G, T, S]
    assert_near(weights.amax(2).sum(2), want)
    recipe.scorer.observe(step, store)
    ours = recipe.scorer.score(step, store)
    assert_near(ours, weights.sum(3).mean(2))
    assert bool((ours <= want + 1e-5).all()) and bool((ours >= want / 2 - 1e-5).all())
    assert not torch.allclose(ours, want, atol=0.1)


def test_snapkv_averages_over_the_group_where_the_peer_takes_the_maximum() -> None:
    want = load("gkv")[0]["snapkv.event0.final"]
    recipe = kvsieve.recipe("snapkv", budget=BUDGET, window=8, kernel=5, pooling="max")
    step, store, slots = at_event("snapkv", 0, recipe)
    assert recipe.scorer is not None
    ours = recipe.scorer.score(step, store)[..., : slots.shape[-1] - 8]
    assert bool((ours <= want + 1e-5).all()) and bool((ours >= want / 2 - 1e-5).all())
    assert not torch.allclose(ours, want, atol=1e-2)
