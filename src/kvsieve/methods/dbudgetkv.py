"""DBudgetKV: drop the least important tokens for as long as the attention hardly shrinks
("DBudgetKV: Dynamic Budget in KV Cache Compression for Ensuring Optimal Performance", arXiv
2502.16886; later versions: "ReFreeKV: Towards Threshold-Free KV Cache Compression").

    rho(c) = (N(0) - N(c)) / N(0),  N(c) = mean over query heads h of ||a_h without the first c||_2
    c* = max { c : rho(c) <= tau };  of every head of the layer, the c* least important slots go

a_h: softmax attention of the last query, over the candidates in the order of removal. That order is
by position, oldest first, or by the attention of the last ``window`` queries; the first ``sinks``
(and then the last ``window``) tokens are no candidates. tau: ``tolerance``. ``metric="full"``
leaves the weights of all other tokens in both norms, which is reached later, as sinks carry most.

The budget is a cap (100% if left out): a layer that would keep more is cut on in the same order.
The first ``whole`` layers keep what the cap allows. One query's attention per event, O(H G S).

Differs from the paper: grouped heads share one cache, so that N is the mean over query heads, and
the order by attention that of the group's mean (the code repeats keys for every query head). Rows
of a batch stop where they would alone. Every prompt part is looked at, not the first alone. Where
the candidates get no attention at all nothing goes. The code's other orders (SnapKV, PyramidKV) and
norms are not offered; its default tau is 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.allocators import Threshold, top_mask
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults
from kvsieve.packing import live_slots
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window, window_mean
from kvsieve.step import Step
from kvsieve.store import Store

Order = Literal["position", "attention"]
Metric = Literal["candidates", "full"]


@dataclass(frozen=True, kw_only=True)
class NormStop(ScorerDefaults):
    """The order in which slots would go, ``[B, H, S]``; -inf for those that do."""

    order: Order
    metric: Metric
    tolerance: float
    sinks: int
    queries: int
    whole: int

    def __post_init__(self) -> None:
        if self.order not in ("position", "attention"):
            raise RecipeError(f"dbudgetkv: order={self.order!r}; possible: position, attention.")
        if self.metric not in ("candidates", "full"):
            raise RecipeError(f"dbudgetkv: metric={self.metric!r}; possible: candidates, full.")
        if not self.tolerance >= 0 or self.whole < 0:
            raise RecipeError("dbudgetkv: tolerance and whole can't be negative.")
        if self.queries < 1:
            raise RecipeError(f"dbudgetkv: window={self.queries}; it must hold 1 query or more.")

    @property
    def window(self) -> int:
        return self.queries if self.order == "attention" else 1

    def score(self, step: Step, store: Store) -> Tensor:
        candidate = live_slots(store) & (store["position"] >= self.sinks)
        if self.order == "attention":
            candidate = candidate & before_window(store, self.queries)
            rank = window_mean(step, store, self.queries).mean(2)
        else:
            rank = store["position"].float().expand(*store.counts.shape, -1)
        if step.layer.ordinal < self.whole:
            return rank
        candidate = candidate.expand_as(rank)
        best_first = rank.masked_fill(~candidate, -torch.inf)
        attention = window_mean(step, store, 1)  # [B, H, G, S]
        stays = top_mask(best_first, self.stop(attention, best_first, candidate)[:, None])
        return rank.masked_fill(candidate & ~stays, -torch.inf)

    def stop(self, attention: Tensor, best_first: Tensor, candidate: Tensor) -> Tensor:
        """Return how many candidates each row must keep in every head, ``[B]`` int64.

        ``attention [B, H, G, S]`` of the last query; ``best_first [B, H, S]``: the later a
        candidate goes, the higher; ``candidate [B, H, S]``.
        """
        order = best_first.sort(dim=-1, descending=True, stable=True).indices
        # In fp64: a norm that rounding made smaller would stop too early.
        square = attention.double().square()
        inside = square.masked_fill(~candidate[:, :, None], 0.0)
        kept = inside.gather(-1, order[:, :, None].expand_as(inside)).cumsum(-1)
        kept = torch.cat([kept.new_zeros(*kept.shape[:-1], 1), kept], -1)  # of the best 0 .. S
        if self.metric == "full":
            kept = kept + (square - inside).sum(-1, keepdim=True)
        norm = kept.sqrt().mean((1, 2))  # [B, 1 + S]
        least = (1 - self.tolerance) * norm[:, -1:]
        stop = (norm < least).sum(-1)
        return stop.where(inside.sum((1, 2, 3)) > 0, candidate.sum(-1).amax(-1))


@method(
    name="dbudgetkv",
    paper="DBudgetKV / ReFreeKV",
    year=2025,
    arxiv="2502.16886",
    certainty="code",
    oracle="Patrick-Ni/ReFreeKV",
)
def dbudgetkv(
    *,
    tolerance: float = 0.01,
    order: Order = "position",
    metric: Metric = "candidates",
    sinks: int = 4,
    window: int = 8,
    whole: int = 2,
) -> Recipe:
    """``tolerance``: tau, the share of its norm that the last query's attention may lose;
    ``order`` of removal: by position or attention (of the last ``window`` queries); ``metric``:
    norm over the candidates or full; ``sinks``, ``whole``: first tokens and layers left whole.
    """
    scorer = NormStop(
        order=order,
        metric=metric,
        tolerance=tolerance,
        sinks=sinks,
        queries=window,
        whole=whole,
    )
    return Recipe(
        method="dbudgetkv",
        scorer=scorer,
        allocator=Threshold(),
        schedule=AfterPrefill(),
        sinks=sinks,
        recent=window if order == "attention" else 0,
    )
