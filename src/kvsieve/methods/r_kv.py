"""R-KV: attention of the last queries minus redundancy among keys, while decoding ("R-KV:
Redundancy-aware KV Cache Compression for Reasoning Models", arXiv 2505.24133).

    I_i = pool_i( mean over the last W queries t of max over the group of A[t, i] )
    R_i = softmax_i( mean_j cos(k_i, k_j), latest near-duplicates forgiven )
    score_i = lambda I_i - (1 - lambda) R_i

A: softmax attention; W window (protected); pool: maximum over ``kernel`` slots; lambda
``importance``. Every ``interval`` decode steps, and after the prompt.

Differs from the paper: nothing known. A public fork adds the redundancy instead of subtracting it;
this follows the paper (and microsoft/G-KV's setting of the same name, which does not normalise).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.scoring import before_window, pool, redundancy
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class ImportanceRedundancy(ScorerDefaults):
    """Pooled window attention minus redundancy, ``[B, H, S]``."""

    queries: int
    kernel: int
    importance: float
    threshold: float

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        weights = step.attention(store, self.queries).amax(2)  # [B, H, W, S]
        valid = step.window(self.queries)[2].sum(1).clamp_min(1)
        mean = weights.sum(2) / valid[:, None, None]
        pooled = pool(mean, before_window(store, self.queries), self.kernel, "max")
        return self.importance * pooled - (1 - self.importance) * redundancy(store, self.threshold)


@method(
    name="r-kv",
    paper="R-KV",
    year=2025,
    arxiv="2505.24133",
    certainty="paper and code",
    oracle="microsoft/G-KV",
    engines=("transformers", "vllm"),
)
def r_kv(
    *,
    window: int = 8,
    kernel: int = 5,
    importance: float = 0.1,
    threshold: float = 0.5,
    interval: int = 128,
) -> Recipe:
    """``importance``: lambda; ``threshold``: cosine above which keys are near-duplicates."""
    scorer = ImportanceRedundancy(
        queries=window, kernel=kernel, importance=importance, threshold=threshold
    )
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="r-kv", scorer=scorer, schedule=schedule, recent=window)
