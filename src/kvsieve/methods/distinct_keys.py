"""Distinct keys: KeyDiff's score on keys before rotation. A recipe of our own.

    u_i = R(-p_i) k_i                                   the cached key, turned back
    m   = mean over the head's cached slots of u_j / ||u_j||
    d_i = mean over the ``kernel`` slots around i of  -cos(u_j, m)
    score_i = d_i

k_i: cached key of the token at position p_i, R: the model's rotation. Cached keys of one token at
two positions differ by their rotation; without it, what is rare is rare by content alone, and the
mean direction doesn't wash out over long contexts. Pooling keeps neighbours of a rare token.

``adaptive``: heads share the layer's budget by one top-k over d, shifted and scaled to mean 0 and
deviation 1 in each head, with AdaKV's floor (arXiv 2407.11550). ``history``: while decoding,
score_i = rank(d_i) + history rank(a_i), with a_i the attention that slot i has received from all
queries so far (H2O, arXiv 2306.14048), and rank 1 for the best of a head's n slots, 1/n for the
last.

Events: after the prompt and at every ``interval``-th decode step, O(S D) time and memory each, in
fp32; nothing between them, except with ``history``: O(T S) per forward and one column.

Differs from the paper: there is none. KeyDiff (arXiv 2504.15364) takes cached keys as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kvsieve.allocators import TopK, Uniform
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, Scope, ScorerDefaults, Signal
from kvsieve.keys import distinctness, unrotated_keys
from kvsieve.packing import live_slots
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.scoring import check_kernel, rank, smooth, standardise
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class DistinctKeys(ScorerDefaults):
    """Minus the cosine of un-rotated keys to their mean direction, ``[B, H, S]``.

    ``comparable``: make the scores of a layer's heads comparable.
    """

    kernel: int = 1
    history: float = 0.0
    comparable: bool = False

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if not 0 <= self.history < math.inf:
            raise RecipeError(f"history={self.history}: a weight is 0 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        sums = {Signal.ATTENTION_SUMS} if self.history else set()
        return frozenset({Signal.PRE_ROPE, *sums})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="attention"),) if self.history else ()

    def observe(self, step: Step, store: Store) -> None:
        if self.history:
            store["attention"] = store["attention"] + step.attention_sums(store)

    def score(self, step: Step, store: Store) -> Tensor:
        inside = live_slots(store)
        scores = distinctness(unrotated_keys(step, store), store)
        scores = smooth(scores, inside, self.kernel)
        if self.history and not step.prefill:
            received = store["attention"].expand(scores.shape)
            scores = rank(scores, inside) + self.history * rank(received, inside)
        return standardise(scores, inside) if self.comparable else scores


@method(
    name="distinct-keys",
    paper="Distinct keys (our own)",
    year=None,
    arxiv=None,
    certainty="own",
    engines=("transformers", "vllm"),
)
def distinct_keys(
    *,
    kernel: int = 1,
    adaptive: bool = False,
    floor: float = 0.2,
    history: float = 0.0,
    interval: int = 16,
    recent: int | float = 16,
) -> Recipe:
    """``kernel``: slots averaged over (odd); ``adaptive``: heads share unevenly, each with at least
    the share ``floor``; ``history``: weight of received attention while decoding; ``interval``:
    decode steps between two compressions; ``recent``: protected last tokens.
    """
    return Recipe(
        method="distinct-keys",
        scorer=DistinctKeys(kernel=kernel, history=history, comparable=adaptive),
        allocator=TopK(scope=Scope.LAYER, floor=floor) if adaptive else Uniform(),
        schedule=AfterPrefill() | Every(interval),
        layout="ragged" if adaptive else "dense",
        recent=recent,
    )
