"""G-KV: the best attention a slot ever had, decayed, minus redundancy ("G-KV: Decoding-Time KV
Cache Eviction with Global Attention", arXiv 2512.00504).

    F_i = mean over the last W queries t of max over the group of A[t, i],  divided by max_j F_j
    S_i = max(alpha S_i(old), F_i)                    for slots scored before, else F_i
    R_i = redundancy as in R-KV, divided by its maximum
    score_i = lambda pool_i(S) - (1 - lambda) R_i

A: softmax attention over all slots; the W window tokens are protected and not scored. S is carried
with the slot (column ``global``), before pooling, which is off as in the paper. At the end of the
prompt and at every ``interval``-th decode step; between them nothing is computed but a ring of W
queries. An event costs O(S^2 D) for R, in tiles, and O(G W S D) for A.

``smoothing``: ``max`` as above, ``mean`` alpha S + (1 - alpha) F, ``sum`` alpha S + F (with alpha 1
and W 1 the sum of H2O, taken at events only). ``ratio``: the budget of a row that has seen n tokens
is max(b, floor(ratio n)). ``normalise=False`` leaves out both divisions by the maximum.

Differs from the paper: scores are in fp32. Ties go to the earlier slot. Average pooling is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.scoring import (
    Pooling,
    before_window,
    check_kernel,
    divide_by_peak,
    pool,
    redundancy,
)
from kvsieve.step import Step
from kvsieve.store import Store

Smoothing = Literal["max", "mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class GlobalAttention(ScorerDefaults):
    """Decayed best attention minus redundancy, ``[B, H, S]``; keeps S in column ``global``."""

    queries: int
    decay: float
    importance: float
    threshold: float
    smoothing: Smoothing
    kernel: int
    pooling: Pooling
    normalise: bool

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1 or not 0 <= self.importance <= 1:
            raise RecipeError("g-kv: decay and importance are shares from 0 to 1.")
        if self.smoothing not in ("max", "mean", "sum"):
            raise RecipeError(f"g-kv: smoothing={self.smoothing!r}; possible: max, mean, sum.")
        if self.queries < 1:
            raise RecipeError(f"g-kv: window={self.queries}; it must hold 1 query or more.")
        check_kernel(self.kernel)
        if self.pooling not in ("avg", "max", "none"):
            raise RecipeError(f"g-kv: pooling={self.pooling!r}; possible: avg, max, none.")

    @property
    def window(self) -> int:
        return self.queries

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="global", fill=-1.0),)  # -1: never scored

    def score(self, step: Step, store: Store) -> Tensor:
        inside = before_window(store, self.queries)
        weights = step.attention(store, self.queries).amax(2)  # [B, H, W, S]
        valid = step.window(self.queries)[2].sum(1).clamp_min(1)
        local = self._scaled(weights.sum(2) / valid[:, None, None], inside)
        old = store["global"]
        merged = torch.where(old < 0, local, self._merge(old, local))
        store["global"] = torch.where(inside, merged, -1.0)
        pooled = pool(merged, inside, self.kernel, self.pooling)
        repeated = self._scaled(redundancy(store, self.threshold), inside)
        return self.importance * pooled - (1 - self.importance) * repeated

    def _scaled(self, scores: Tensor, inside: Tensor) -> Tensor:
        return divide_by_peak(scores, inside) if self.normalise else scores

    def _merge(self, old: Tensor, local: Tensor) -> Tensor:
        if self.smoothing == "max":
            return torch.maximum(self.decay * old, local)
        share = 1.0 if self.smoothing == "sum" else 1 - self.decay
        return self.decay * old + share * local


@method(
    name="g-kv",
    paper="G-KV",
    year=2025,
    arxiv="2512.00504",
    certainty="paper and code",
    oracle="microsoft/G-KV",
    engines=("transformers", "vllm"),
)
def g_kv(
    *,
    window: int = 16,
    decay: float = 0.8,
    importance: float = 0.5,
    threshold: float = 0.5,
    smoothing: Smoothing = "max",
    kernel: int = 1,
    pooling: Pooling = "max",
    normalise: bool = True,
    ratio: float = 0.0,
    interval: int = 128,
) -> Recipe:
    """``decay``: alpha; ``importance``: lambda; ``kernel``, ``pooling``: of scores (kernel 1: off);
    ``ratio``: least share of a row's tokens kept, with a budget in slots."""
    scorer = GlobalAttention(
        queries=window,
        decay=decay,
        importance=importance,
        threshold=threshold,
        smoothing=smoothing,
        kernel=kernel,
        pooling=pooling,
        normalise=normalise,
    )
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="g-kv", scorer=scorer, schedule=schedule, recent=window, ratio=ratio)
