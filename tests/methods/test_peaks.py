"""No method makes anything of the size T x S: memory of an event at 32k slots, for all of them.

A layer holds 32 k tokens less 512, as if they had come in earlier parts of a prompt; 512 more come
with their queries, and the layer is attended to, observed, scored and compressed. What is counted
is every tensor made meanwhile and not yet freed, as a multiple of the layer's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from drawn import Drawn
from torch import Tensor

import kvsieve
from kvsieve import registry
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.session import Session
from kvsieve.step import Step
from kvsieve.store import Store

from .allocations import Allocations
from .support import Layer, draw

H, G, S, D, T = 4, 2, 1 << 15, 64, 1 << 9
LAYER = 2 * H * S * D * 4  # bytes: keys and values in fp32, 64 MiB
PAIRS = H * G * T * S * 4  # bytes: attention of all T queries, 512 MiB; S x S: 4 GiB a head
BUDGET = S // 16

# What is made at once beside the layer at most, in layers: by methods that look at a window of
# queries or at one slot after the other; by those that turn, normalise or sketch all keys in fp32
# (leverage solves in fp64); and by those that look at all queries, in blocks of a fixed size
# (64 MiB in fp32, here as much as the layer), of which a masked softmax needs four.
BESIDE, ALL_KEYS, ALL_QUERIES = 2.0, 4.0, 5.0
AT_ONCE = ("compactor", "distinct-keys", "g-kv", "keydiff", "leverage", "r-kv", "threshold")

OPTIONS: dict[str, dict[str, Any]] = {
    "dbudgetkv": {"whole": 0},
    "duo-attention": {"stats": Drawn(heads=H, group=G, head_dim=D)},
    "q-filters": {"stats": Drawn(heads=H, group=G, head_dim=D)},
}
EVERYTHING = [name for name in registry.methods() if name != "full"]


@cache
def layer() -> Layer:
    """All tokens' keys and values, the last tokens' queries."""
    whole = draw(B=1, H=H, G=G, S=T, D=D, angles=tuple(0.5**i for i in range(D // 2)))
    made = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, H, S, D, generator=made) for _ in range(2))
    return Layer(
        queries=whole.queries, keys=keys, values=values, w_o=torch.randn(H, G, D, 256),
        angles=whole.angles,
    )  # fmt: skip


def bound(name: str, recipe: kvsieve.Recipe) -> float:
    """What a method may make, in layers, by what it asks for."""
    if {Signal.ATTENTION_SUMS, Signal.REPLAY} & recipe.needs:
        return ALL_QUERIES
    return ALL_KEYS if name in AT_ONCE else BESIDE


def peak(recipe: kvsieve.Recipe) -> int:
    """Bytes made at once while a part of a prompt ends it, beyond what was held before."""
    given = layer()
    session = Session(recipe, [given.info()], prompt_length=T)
    store = session.layers[0].store
    store.append(given.keys[:, :, : S - T].contiguous(), given.values[:, :, : S - T].contiguous())
    new = given.part(S - T, S)
    ids = torch.zeros(1, T, dtype=torch.int64)
    session.begin(T, None, None, ids)
    session.append(0, new.keys, new.values)
    held = [*store.table.tensors(), given.queries, given.keys, given.values]

    def again(ids: Tensor, _: Tensor) -> None:
        session.begin(ids.shape[1], None, None, ids)
        session.append(0, new.keys[:, :, : ids.shape[1]], new.values[:, :, : ids.shape[1]])
        session.attend(0, given.queries[:, :, :, : ids.shape[1]], given.scale)
        session.end(again)

    with torch.no_grad(), Allocations(held) as made_here:
        session.attend(0, given.queries, given.scale)
        session.end(again)
    assert session.removed > 0 and int(store.counts.max()) <= S // 2, "it was to compress"
    return made_here.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_an_event_at_32k_slots_stays_beside_the_layer(name: str) -> None:
    recipe = kvsieve.recipe(name, budget=BUDGET, **OPTIONS.get(name, {}))
    most = bound(name, recipe) * LAYER
    assert most < 0.7 * PAIRS, "the bound was to tell"
    made = peak(recipe)
    print(f"{name}: {made / LAYER:.2f} layers of {most / LAYER}")
    assert made <= most


@dataclass(frozen=True, kw_only=True)
class AllAtOnce(ScorerDefaults):
    """Attention of half of the part's queries in one piece: what no method may do."""

    def score(self, step: Step, store: Store) -> Tensor:
        half = slice(0, T // 2)
        valid = torch.ones_like(step.positions[:, half], dtype=torch.bool)
        weights = step.weights(store, step.query[:, :, :, half], step.positions[:, half], valid)
        return weights.mean((2, 3))


@pytest.mark.slow
def test_a_matrix_of_queries_and_slots_is_seen() -> None:
    recipe = replace(kvsieve.recipe("knorm", budget=BUDGET), scorer=AllAtOnce())
    assert peak(recipe) > ALL_QUERIES * LAYER
