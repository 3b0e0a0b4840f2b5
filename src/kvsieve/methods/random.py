"""Random eviction: the lower anchor of every comparison.

    score_i = a uniform number in [0, 1) drawn for (seed, layer, head, position i)

Differs from the paper: there is no paper. The number depends on the token's position only, so that
a sequence keeps the same slots alone, in a batch, and in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.sketch import uniform
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Random(ScorerDefaults):
    """Uniform numbers from an integer hash, ``[B, H, S]``."""

    seed: int = 0

    def score(self, step: Step, store: Store) -> Tensor:
        B, H = store.counts.shape
        layer = step.layer
        drawn = uniform(store["position"], layer.ordinal, H, self.seed, layer.first_head)
        return drawn.expand(B, H, -1)


@method(
    name="random",
    paper="Random eviction",
    year=None,
    arxiv=None,
    certainty="own",
    chunk_invariant=True,
    engines=("transformers", "vllm"),
)
def random(*, seed: int = 0, interval: int = 128) -> Recipe:
    """``seed`` of the numbers; ``interval``: decode steps between two compressions."""
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="random", scorer=Random(seed=seed), schedule=schedule)
