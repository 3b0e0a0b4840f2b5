"""SimLayerKV: lazy layers look at the first and last tokens only, and need no others ("SimLayerKV:
A Simple Framework for Layer-Level KV Cache Reduction", arXiv 2410.13846).

    need of a layer = attention of the last ``queries`` queries on all but the first ``sinks`` and
                      the last ``window`` tokens, mean over query heads and queries
    all layers keep sinks and window; in order of need, layers keep everything until the model's
    budget is used;  score_i = need * (1 + position_i / n) / 2, the newest first inside a layer

n: tokens that have passed. A layer of small need is lazy: one minus it is the paper's measure. It
costs one query's attention per event, O(H G S), and the full cache until the last layer is done.

Differs from the paper: the paper calls a layer lazy above a threshold (0.65 to 0.9, by model) and
takes the size that comes of it; here the budget is given, and the laziest layers are cut, as many
as it takes. The layer on the line is cut in part. Attention on learned sinks counts as lazy. Lazy
layers grow while decoding, until the next turn; give a schedule to cut them before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.allocators import LazyLayers
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window, window_mean
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class LayerNeed(ScorerDefaults):
    """A layer's need of its middle tokens, the newest of them first, ``[B, H, S]``."""

    sinks: int = 4
    recent: int = 1024
    queries: int = 1

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise RecipeError(f"simlayerkv: queries={self.queries}; it asks 1 query or more.")

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        position = store["position"]
        middle = before_window(store, self.recent) & (position >= self.sinks)
        attention = window_mean(step, store, self.queries)  # [B, H, G, S]
        share = attention.masked_fill(~middle[:, :, None], 0.0).sum(-1).mean((1, 2))  # [B]
        age = position / store.seen.to(position.device).clamp_min(1)[:, None, None]
        # Above zero, so that a layer without any need still keeps its newest tokens first.
        need = share.clamp_min(torch.finfo(torch.float32).tiny * 2**24)[:, None, None]
        return (need * (1 + age) / 2).expand(*store.counts.shape, -1)


@method(
    name="simlayerkv",
    paper="SimLayerKV",
    year=2024,
    arxiv="2410.13846",
    certainty="code",
)
def simlayerkv(*, sinks: int = 4, window: int = 1024, queries: int = 1) -> Recipe:
    """``sinks``, ``window``: first and last tokens that lazy layers keep; ``queries`` asked."""
    return Recipe(
        method="simlayerkv",
        scorer=LayerNeed(sinks=sinks, recent=window, queries=queries),
        allocator=LazyLayers(),
        schedule=AfterPrefill(),
        sinks=sinks,
        recent=window,
    )
