"""LaProx: eviction as sampling of the product A (V W_O), one selection over the whole model
("Reformulating KV Cache Eviction Problem for Long-Context LLM Inference", arXiv 2605.07234).

    c_i = pool_i( || mean over the group of A[last W, i] ||_2 )
    p_i = c_i * mean over the group of || v_i W_O ||_2
    score_i = p_i / (sum of p over heads and slots of the layer);  top-k over layers, heads, slots

A: softmax attention; W window (protected, not scored). ``||v W_O||`` in Gram form, in blocks of
slots, attention in blocks of queries: O(W S D + G S D^2) time per layer, beside the layer no more
memory than a block and a few numbers a slot. All layers stay whole until the last one is scored.

Differs from the paper: re-implementation from two secondary descriptions that agree; where they
differ, options name the readings. ``gqa`` (all alike for one query head per KV head):
    mean_attn     the paper's "mean attention within the group", as above
    per_head      each query head scored by itself, then the mean
    per_head_sum  their sum (the same order)
    sum_proj      c_i times || v_i (sum of the group's W_O) ||, exact if its heads attend alike
``pooled``: what is smoothed, the ``column`` norm c or the ``score`` p. ``normalise=False`` leaves
out the layer's sum; it and the scopes ``layer`` and ``head`` are the paper's ablations. Settings of
others: per_head with pooled score (a public audit); per_head_sum, window 8, kernel 1 (another
re-implementation).
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
from kvsieve.scoring import before_window, check_kernel, column_norm, pool, projected_norm
from kvsieve.step import Step
from kvsieve.store import Store

Grouping = Literal["mean_attn", "per_head", "per_head_sum", "sum_proj"]
Pooled = Literal["column", "score"]
_GROUPINGS = ("mean_attn", "per_head", "per_head_sum", "sum_proj")


@dataclass(frozen=True, kw_only=True)
class LaProx(ScorerDefaults):
    """Column norm of attention times norm of the projected value, ``[B, H, S]``."""

    queries: int = 32
    kernel: int = 7
    gqa: Grouping = "mean_attn"
    pooled: Pooled = "column"
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.gqa not in _GROUPINGS:
            raise RecipeError(f"laprox: gqa={self.gqa!r}; possible: {', '.join(_GROUPINGS)}.")
        if self.pooled not in ("column", "score"):
            raise RecipeError(f"laprox: pooled={self.pooled!r}; possible: column, score.")
        check_kernel(self.kernel)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.W_O, Signal.VALUES})

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        inside = before_window(store, self.queries)
        grouped = self.gqa in ("mean_attn", "sum_proj")
        column = column_norm(step, store, self.queries, grouped)  # [B, H, 1|G, S]
        norms = projected_norm(step, store, summed=self.gqa == "sum_proj")  # [B, H, 1|G, S]
        if self.gqa == "mean_attn":
            norms = norms.mean(2, keepdim=True)
        if self.pooled == "column":
            heads = [pool(c, inside, self.kernel, "avg") for c in column.unbind(2)]
            column = torch.stack(heads, 2)
        product = column * norms
        product = product.sum(2) if self.gqa == "per_head_sum" else product.mean(2)
        if self.pooled == "score":
            product = pool(product, inside, self.kernel, "avg")
        if not self.normalise:
            return product
        total = product.masked_fill(~inside, 0.0).sum((1, 2), keepdim=True)
        return product / total.clamp_min(torch.finfo(torch.float32).tiny)


@method(
    name="laprox",
    paper="LaProx",
    year=2026,
    arxiv="2605.07234",
    certainty="secondary description",
    engines=("transformers", "vllm"),
)
def laprox(
    *,
    window: int = 32,
    kernel: int = 7,
    gqa: Grouping = "mean_attn",
    pooled: Pooled = "column",
    normalise: bool = True,
    scope: Literal["model", "layer", "head"] = "model",
) -> Recipe:
    """``gqa``: rule for grouped heads; ``pooled``: what is smoothed (column, score);
    ``normalise``: by the layer's sum; ``scope``: where budgets are shared.
    """
    scopes = {"model": Scope.MODEL, "layer": Scope.LAYER, "head": Scope.HEAD}
    if scope not in scopes:
        raise RecipeError(f"laprox: scope={scope!r}; possible: {', '.join(scopes)}.")
    even = scope == "head"
    scorer = LaProx(queries=window, kernel=kernel, gqa=gqa, pooled=pooled, normalise=normalise)
    return Recipe(
        method="laprox",
        scorer=scorer,
        allocator=Uniform() if even else TopK(scope=scopes[scope]),
        schedule=AfterPrefill(),
        layout="dense" if even else "ragged",
        recent=window,
    )
