"""KVzip: a slot matters if it is needed to repeat the context ("KVzip: Query-Agnostic KV Cache
Compression with Context Reconstruction", arXiv 2505.23416).

After the prompt, each chunk of it is fed again with the full cache in place: first ``repeat_ids``
(a tokenised "repeat the previous context" request), the last 8 tokens before the chunk, then the
chunk itself. For a slot i of the chunk

    score_i = max over fed queries t and the group of  softmax over [sinks, chunk, fed] of q_t . k

What the repetition stores is dropped. One top-k over all layers, heads and slots; the first
``sinks`` tokens stay. Costs one to two further prefills, and the full cache until they are done.

Differs from the paper: the request is fed only if its token ids are given (``repeat_ids``), since a
cache has no tokenizer; the chat suffix counts as part of them, and every chunk gets the same
request. A chat prefix is scored like the rest of the prompt (kvpress leaves it out, so that all of
it but the sinks goes first). The normalised "plus" variant is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.allocators import TopK
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, Scope, ScorerDefaults, Signal
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import query_blocks


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ScorerDefaults):
    """Highest attention while the context is repeated, ``[B, H, S]``."""

    chunk: int = 2048
    overlap: int = 8
    sinks: int = 4
    repeat_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.overlap < 0:
            raise RecipeError("kvzip: chunk must be 1 or more, overlap 0 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.REPLAY})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="reconstruction"),)

    def observe(self, step: Step, store: Store) -> None:
        if step.replayed is None:
            return
        position = store["position"]
        start, end = step.replayed[:, :1, None], step.replayed[:, 1:, None]  # [B, 1, 1]
        in_chunk = (position >= start) & (position < end)
        fed = step.query.shape[3] if step.live is None else step.live.sum(1).cpu()
        own = position >= (store.seen - fed).to(position.device)[:, None, None]
        allowed = in_chunk | own | ((position < self.sinks) & (position < start))
        best = self._best(step, store, allowed)
        column = store["reconstruction"]
        store["reconstruction"] = torch.where(in_chunk, best.maximum(column), column)

    def _best(self, step: Step, store: Store, allowed: Tensor) -> Tensor:
        B, H, G, T, _ = step.query.shape
        live = step.live
        valid = torch.ones_like(step.positions, dtype=torch.bool) if live is None else live
        best = torch.zeros(B, H, store.slots, device=step.query.device)
        for t0, t1 in query_blocks(T, B * H * G * store.slots):
            block = step.query[:, :, :, t0:t1]
            weights = step.weights(store, block, step.positions[:, t0:t1], valid[:, t0:t1], allowed)
            best = best.maximum(weights.amax((2, 3)))
        return best

    def score(self, step: Step, store: Store) -> Tensor:
        return store["reconstruction"].expand(*store.counts.shape, -1)


@method(
    name="kvzip",
    paper="KVzip",
    year=2025,
    arxiv="2505.23416",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def kvzip(
    *,
    chunk: int = 2048,
    overlap: int = 8,
    sinks: int = 4,
    repeat_ids: Sequence[int] = (),
    scope: Literal["model", "layer"] = "model",
    floor: float = 0.0,
) -> Recipe:
    """``chunk``: tokens repeated at once; ``repeat_ids``: token ids of the repeat request;
    ``scope``: where budgets are shared; ``floor``: share of its even part that each head keeps.
    """
    scopes = {"model": Scope.MODEL, "layer": Scope.LAYER}
    if scope not in scopes:
        raise RecipeError(f"kvzip: scope={scope!r}; possible: {', '.join(scopes)}.")
    scorer = Reconstruction(
        chunk=chunk, overlap=overlap, sinks=sinks, repeat_ids=tuple(int(i) for i in repeat_ids)
    )
    return Recipe(
        method="kvzip",
        scorer=scorer,
        allocator=TopK(scope=scopes[scope], floor=floor),
        schedule=AfterPrefill(),
        layout="ragged",
        sinks=sinks,
    )
