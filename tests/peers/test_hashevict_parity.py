"""Distances and evictions of minghui-liu/cold-compress's HashEvict cache (keys hash for keys)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.session import Session
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store

from .recorded import load, positions_of

TENSORS, HEADER = load("hashevict")
STEPS = range(len(TENSORS["bits64.before"]))


@pytest.fixture(autouse=True)
def _their_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash with the peer's random numbers, by the length of a code."""

    def theirs(rows: int, columns: int, *, seed: int) -> Tensor:
        return TENSORS[f"bits{columns}.projection"]

    monkeypatch.setattr("kvsieve.methods.hash_evict.gaussian", theirs)


def recipe(bits: int) -> kvsieve.Recipe:
    # The peer's window lies before the new token, ours takes it in.
    own: dict[str, Any] = {"sinks": HEADER["sinks"], "recent": HEADER["recent"] + 1}
    return kvsieve.recipe("hash-evict", budget=HEADER["slots"], source="key", bits=bits, **own)


def test_a_run_evicts_what_the_peer_evicts() -> None:
    key, prompt = TENSORS["bits64.key"], HEADER["prompt"]
    session = Session(recipe(64), [LayerInfo(ordinal=0)])
    changed = 0
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, key.shape[2]))]:
        new = key[:, :, start:end]
        session.begin(end - start, None, None)
        session.append(0, new, new)
        session.attend(0, new[:, :, None], 0.25)
        session.end()
        if start < prompt:
            continue
        after = TENSORS["bits64.after"][start - prompt]  # [H, M], -1: empty
        want = torch.zeros(1, after.shape[0], end, dtype=torch.int64)
        want[0].scatter_add_(1, after.clamp_min(0).long(), (after >= 0).long())
        assert torch.equal(positions_of(session.layers[0].store, end), want == 1)
        changed += int((after[0] != after[1]).any())
    assert changed >= 5, "heads were to choose for themselves"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bits", [64, 16])
def test_distances(bits: int, step: int) -> None:
    """A layer that holds what the peer held, with the token that it was given next."""
    key = TENSORS[f"bits{bits}.key"]
    before, want = (TENSORS[f"bits{bits}.{x}"][step] for x in ("before", "distance"))
    count = int((before[0] >= 0).sum())
    index = before[None, :, :count, None].long().expand(-1, -1, -1, key.shape[-1])
    held, new = key.gather(2, index), key[:, :, HEADER["prompt"] + step, None]
    scorer = recipe(bits).scorer
    assert scorer is not None
    store, info = Store(scorer.columns), LayerInfo(ordinal=0)
    for keys, prefill in ((held, True), (new, False)):
        place = store.append(keys, keys)
        now = Step(layer=info, query=keys[:, :, None], scale=1.0, positions=place, prefill=prefill)
        if prefill:
            scorer.observe(now, store)
    far = want[:, :count]
    nearer = scorer.score(now, store)[0, :, :-1].floor()  # less than a bit: the age
    assert torch.equal(nearer, (far.amax(-1, keepdim=True) - far).float())
