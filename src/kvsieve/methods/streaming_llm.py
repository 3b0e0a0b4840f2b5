"""StreamingLLM: the first tokens (attention sinks) and the most recent ones ("Efficient Streaming
Language Models with Attention Sinks", arXiv 2309.17453).

    keep slots 0 .. s-1 and the last b - s

s: sinks (4), b: budget.

Differs from the paper: the paper renumbers positions inside the cache before rotating; here every
token keeps the rotation of its true position, as in kvpress. ``rerotate=True`` is the paper's way.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, EachStep
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Recency(ScorerDefaults):
    """The later, the better: ``[B, H, S]``."""

    def score(self, step: Step, store: Store) -> Tensor:
        return store["position"].float().expand(*store.counts.shape, -1)


@method(
    name="streaming-llm",
    paper="StreamingLLM",
    year=2023,
    arxiv="2309.17453",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    chunk_invariant=True,
)
def streaming_llm(*, sinks: int = 4) -> Recipe:
    """``sinks``: first tokens that always stay."""
    schedule = AfterPrefill() | EachStep()
    return Recipe(method="streaming-llm", scorer=Recency(), schedule=schedule, sinks=sinks)
