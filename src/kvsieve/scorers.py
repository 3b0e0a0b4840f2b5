"""Scorers that more than one method uses unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults
from kvsieve.scoring import Pooling, before_window, check_kernel, pool, window_mean
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Recency(ScorerDefaults):
    """The later, the better: ``[B, H, S]``."""

    def score(self, step: Step, store: Store) -> Tensor:
        return store["position"].float().expand(*store.counts.shape, -1)


@dataclass(frozen=True, kw_only=True)
class WindowAttention(ScorerDefaults):
    """Attention of the last W queries, pooled over neighbours, averaged over the group (SnapKV).

    ``queries``: W; ``kernel`` and ``pooling``: smoothing over the slots before the window.
    """

    queries: int
    kernel: int
    pooling: Pooling

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise RecipeError(f"window={self.queries}: the window must hold 1 query or more.")
        check_kernel(self.kernel)
        if self.pooling not in ("avg", "max", "none"):
            raise RecipeError(f"pooling={self.pooling!r}: possible are 'avg', 'max', 'none'.")

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        attention = window_mean(step, store, self.queries)  # [B, H, G, S]
        inside = before_window(store, self.queries)
        # Pooling takes [B, H, S]: averaging is linear, so that the group mean may come first;
        # a maximum has to be taken per query head.
        if self.pooling != "max":
            return pool(attention.mean(2), inside, self.kernel, self.pooling)
        heads = [pool(a, inside, self.kernel, "max") for a in attention.unbind(2)]
        return sum(heads[1:], heads[0]) / len(heads)
