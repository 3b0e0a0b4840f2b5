"""H2O: tokens that have received much attention are heavy hitters ("H2O: Heavy-Hitter Oracle for
Efficient Generative Inference of Large Language Models", arXiv 2306.14048).

    score_i = sum over all queries t so far of mean over the group of A[t, i]

A: softmax attention. The sum is carried with the slot; half of the budget goes to the highest
sums, half to the most recent tokens. ``normalise=True`` divides by the number of queries that
could see slot i (kvpress calls that "observed attention").

Needs the attention of every query: at prefill it is recomputed in blocks, at decode once more per
step. Cost O(T S) per forward, memory O(S).

Differs from the paper: grouped heads are averaged (the paper has no grouped attention; kvpress
averages too, microsoft/G-KV takes the maximum and adds the last query's attention at events only).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import Column, ScorerDefaults, Signal
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, EachStep
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class AccumulatedAttention(ScorerDefaults):
    """Running sum of attention received, ``[B, H, S]``; optionally per query."""

    normalise: bool = False

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.ATTENTION_SUMS})

    @property
    def columns(self) -> tuple[Column, ...]:
        visits = (Column(name="visits"),) if self.normalise else ()
        return (Column(name="attention"), *visits)

    def observe(self, step: Step, store: Store) -> None:
        store["attention"] = store["attention"] + step.attention_sums(store)
        if self.normalise:
            new = step.positions.shape[1] if step.live is None else step.live.sum(1).cpu()
            first_new = (store.seen - new).to(store.device)[:, None, None]
            since = store["position"].maximum(first_new)
            # Slot i is seen by this forward's queries from its own position on.
            visits = store.seen.to(store.device)[:, None, None] - since
            store["visits"] = store["visits"] + visits.expand(*store.counts.shape, -1)

    def score(self, step: Step, store: Store) -> Tensor:
        total = store["attention"].expand(*store.counts.shape, -1)
        if not self.normalise:
            return total
        # Padding that a finished row is fed may be seen by no query at all.
        return total / store["visits"].clamp_min(1)


@method(
    name="h2o",
    paper="H2O",
    year=2023,
    arxiv="2306.14048",
    certainty="paper and code",
    oracle="kvpress 0.5.5, microsoft/G-KV",
)
def h2o(*, recent: int | float = 0.5, normalise: bool = False) -> Recipe:
    """``recent``: protected recent tokens (a float is a share of the budget)."""
    scorer = AccumulatedAttention(normalise=normalise)
    schedule = AfterPrefill() | EachStep()
    return Recipe(method="h2o", scorer=scorer, schedule=schedule, recent=recent)
