"""LaProx: eviction as sampling of the product A (V W_O), one selection over the whole model
("Reformulating KV Cache Eviction Problem for Long-Context LLM Inference", arXiv 2605.07234).

    c_i = pool_i( || mean over the group of A[last W, i] ||_2 )
    p_i = c_i * mean over the group of || v_i W_O ||_2
    score_i = p_i / (sum of p over heads and slots of the layer);  top-k over layers, heads, slots

A: softmax attention; W window (protected, not scored). ``||v W_O||`` in Gram form.

Differs from the paper: re-implementation from two secondary descriptions that agree; where they
differ (what is pooled) this file pools the column norm. The paper's group rule is read as the mean
of attention (``gqa="mean_attn"``); ``per_head`` scores each query head by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.allocators import TopK, Uniform
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Scope, ScorerDefaults, Signal
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window, pool, projected_norm
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class LaProx(ScorerDefaults):
    """Column norm of attention times norm of the projected value, ``[B, H, S]``."""

    queries: int = 32
    kernel: int = 7
    gqa: Literal["mean_attn", "per_head"] = "mean_attn"

    def __post_init__(self) -> None:
        if self.gqa not in ("mean_attn", "per_head"):
            raise RecipeError(f"laprox: gqa={self.gqa!r}; possible: mean_attn, per_head.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.W_O, Signal.VALUES})

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        inside = before_window(store, self.queries)
        attention = step.attention(store, self.queries)  # [B, H, G, W, S]
        norms = projected_norm(step, store)  # [B, H, G, S]
        if self.gqa == "mean_attn":
            column = pool(attention.mean(2).norm(dim=2), inside, self.kernel, "avg")
            product = column * norms.mean(2)
        else:
            heads = [pool(a.norm(dim=2), inside, self.kernel, "avg") for a in attention.unbind(2)]
            product = (torch.stack(heads, 2) * norms).mean(2)
        total = product.masked_fill(~inside, 0.0).sum((1, 2), keepdim=True)
        return product / total.clamp_min(torch.finfo(torch.float32).tiny)


@method(
    name="laprox",
    paper="LaProx",
    year=2026,
    arxiv="2605.07234",
    certainty="secondary description",
)
def laprox(
    *,
    window: int = 32,
    kernel: int = 7,
    gqa: Literal["mean_attn", "per_head"] = "mean_attn",
    scope: Literal["model", "layer", "head"] = "model",
) -> Recipe:
    """``scope``: where budgets are shared; ``layer`` and ``head`` are the paper's ablations."""
    scopes = {"model": Scope.MODEL, "layer": Scope.LAYER, "head": Scope.HEAD}
    if scope not in scopes:
        raise RecipeError(f"laprox: scope={scope!r}; possible: {', '.join(scopes)}.")
    even = scope == "head"
    return Recipe(
        method="laprox",
        scorer=LaProx(queries=window, kernel=kernel, gqa=gqa),
        allocator=Uniform() if even else TopK(scope=scopes[scope]),
        schedule=AfterPrefill(),
        layout="dense" if even else "ragged",
        recent=window,
    )
