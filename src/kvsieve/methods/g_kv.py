"""G-KV: the best attention a slot ever had, decayed, minus redundancy ("G-KV: Decoding-Time KV
Cache Eviction with Global Attention", arXiv 2512.00504).

    F_i = mean over the last W queries t of max over the group of A[t, i],  divided by max_j F_j
    S_i = max(alpha S_i(old), F_i)                    for slots scored before, else F_i
    R_i = redundancy as in R-KV, divided by its maximum
    score_i = lambda S_i - (1 - lambda) R_i

A: softmax attention over all slots; the W window tokens are protected and not scored. S is carried
with the slot (column ``global``). At the end of the prompt and at every ``interval``-th decode
step; between them nothing is computed but a ring of W queries.

Differs from the paper: scores are in fp32. Ties go to the earlier slot. ``smoothing`` also offers
the paper's ``mean`` (alpha S + (1 - alpha) F) and ``sum`` (alpha S + F). The released code can do
without the division by the maximum; here only r-kv, which carries no score, does so.
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
from kvsieve.scoring import before_window, divide_by_peak, pool, redundancy
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

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1 or not 0 <= self.importance <= 1:
            raise RecipeError("g-kv: decay and importance are shares from 0 to 1.")
        if self.smoothing not in ("max", "mean", "sum"):
            raise RecipeError(f"g-kv: smoothing={self.smoothing!r}; possible: max, mean, sum.")

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
        local = divide_by_peak(weights.sum(2) / valid[:, None, None], inside)
        old = store["global"]
        merged = torch.where(old < 0, local, self._merge(old, local))
        store["global"] = torch.where(inside, merged, -1.0)
        pooled = pool(merged, inside, self.kernel, "max" if self.kernel > 1 else "none")
        repeated = divide_by_peak(redundancy(store, self.threshold), inside)
        return self.importance * pooled - (1 - self.importance) * repeated

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
)
def g_kv(
    *,
    window: int = 16,
    decay: float = 0.8,
    importance: float = 0.5,
    threshold: float = 0.5,
    smoothing: Smoothing = "max",
    kernel: int = 1,
    interval: int = 128,
) -> Recipe:
    """``decay``: alpha; ``importance``: lambda; ``kernel``: max-pooling of scores (1: off)."""
    scorer = GlobalAttention(
        queries=window,
        decay=decay,
        importance=importance,
        threshold=threshold,
        smoothing=smoothing,
        kernel=kernel,
    )
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="g-kv", scorer=scorer, schedule=schedule, recent=window)
