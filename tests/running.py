"""Running a model by hand, forward by forward, and looking at what its cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor

import kvsieve
from kvsieve import Recipe
from kvsieve.errors import EngineError
from kvsieve.store import Store

Kept = list[list[list[list[int]]]]
"""Kept positions ``[layer][row][head]``, in the order in which they are stored."""


def positions_of(store: Store) -> list[list[list[int]]]:
    """Return the positions of the live slots, ``[row][head]``, as stored."""
    B, H = store.counts.shape
    position = store["position"].expand(B, H, -1)
    live = torch.ones_like(position, dtype=torch.bool) if store.live is None else store.live
    live = live.expand(B, H, -1)
    return [[position[b, h][live[b, h]].tolist() for h in range(H)] for b in range(B)]


def kept(cache: kvsieve.Cache) -> Kept:
    """Return what a cache holds."""
    return [positions_of(layer.store) for layer in cache.session.layers]


def row_of(held: Kept, row: int) -> Kept:
    """Return one row of what a cache holds, as a batch of one."""
    return [[layer[row]] for layer in held]


def counts(cache: kvsieve.Cache) -> Tensor:
    """Return the number of live slots ``[L, B, H]``, counted from the stored positions."""
    return torch.tensor([[[len(h) for h in row] for row in layer] for layer in kept(cache)])


@dataclass
class Trace:
    """What a decode loop saw: per forward the last logits ``[B, V]`` and what was held after it."""

    tokens: Tensor
    logits: list[Tensor] = field(default_factory=list)
    held: list[Kept] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    report: Any = None
    cache: Any = None


@torch.no_grad()
def decode(
    model: Any,
    recipe: Recipe,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    steps: int,
    chunks: Sequence[int] = (),
    prompt_length: int | None = None,
    forced: Tensor | None = None,
    keep_open: bool = False,
    traced: bool = False,
) -> Trace:
    """Feed a prompt (in chunks) and decode greedily, or along ``forced [B, steps]``."""
    cache = kvsieve.Cache(model, recipe, prompt_length=prompt_length, trace=traced)
    mask = torch.ones_like(ids) if mask is None else mask
    trace = Trace(tokens=ids[:, :0], cache=cache)
    bounds = [0, *torch.tensor(chunks or [ids.shape[1]]).cumsum(0).tolist()]
    assert bounds[-1] == ids.shape[1], "the chunks make up the prompt"
    parts = [ids[:, a:b] for a, b in pairwise(bounds)]
    fed = 0
    for number in range(len(parts) + steps):
        part = parts[number] if number < len(parts) else trace.tokens[:, -1:]
        fed += part.shape[1]
        if fed > mask.shape[1]:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        place = (mask.cumsum(1) - 1).clamp_min(0)[:, fed - part.shape[1] : fed]
        logits = model(
            part,
            attention_mask=mask[:, :fed],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        trace.held.append(kept(cache))
        trace.counts.append(counts(cache))
        if number < len(parts) - 1:
            continue
        trace.logits.append(logits)
        step = number - len(parts) + 1
        if step == steps:
            break
        chosen = logits.argmax(-1) if forced is None else forced[:, step]
        trace.tokens = torch.cat([trace.tokens, chosen[:, None]], 1)
    trace.report = cache.report
    if not keep_open:
        cache.close()
    return trace


def refused(family: str) -> bool:
    """Whether this release gives the family a cache of its own."""
    return family == "qwen3-next" and not tiny(family)._supports_default_dynamic_cache()


def skip_refused(family: str) -> None:
    """Skip a family that this release of Transformers can't have compressed."""
    if refused(family):
        with pytest.raises(EngineError, match="its own kind of cache"):
            kvsieve.attach(tiny(family), kvsieve.recipe("full"))
        pytest.skip("refused in this release, as asserted")
