"""KeyDiff: keys that point away from the mean direction matter; no attention needed ("KeyDiff: Key
Similarity-Based KV Cache Eviction for Long-Context LLM Inference", arXiv 2504.15364).

    score_i = -cos(k_i, m),   m = mean over the cached slots of k_j / ||k_j||

Equal in order to minus the total cosine similarity with all cached keys, sum over j of
cos(k_i, k_j). O(S D) per event. ``anchor="mean"`` takes the mean of the keys as long as they are,
as one vendor's runtime does: another ranking wherever norms vary.

The paper's bounded prefill is a prompt that comes in blocks (``prefill_chunk_size``, 128 in the
paper) under the default schedule: after each block every head is back at its budget N, so that it
never holds more than N + 128 slots however long the prompt. ``recent`` is its sliding window.

Differs from the paper: keys of a prompt that comes in one forward are scored once at its end. Ties
go to the earlier slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults
from kvsieve.keys import distinctness
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store

Anchor = Literal["unit", "mean"]


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScorerDefaults):
    """Minus the cosine to the mean key direction, ``[B, H, S]``."""

    anchor: Anchor = "unit"

    def __post_init__(self) -> None:
        if self.anchor not in ("unit", "mean"):
            raise RecipeError(f"keydiff: anchor={self.anchor!r}; possible: unit, mean.")

    def score(self, step: Step, store: Store) -> Tensor:
        return distinctness(store.keys.float(), store, normalise=self.anchor == "unit")


@method(
    name="keydiff",
    paper="KeyDiff",
    year=2025,
    arxiv="2504.15364",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    engines=("transformers", "vllm"),
)
def keydiff(*, anchor: Anchor = "unit", interval: int = 128) -> Recipe:
    """``anchor``: mean of normalised keys (unit) or of keys (mean); ``interval``: decode steps
    between two compressions.
    """
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="keydiff", scorer=KeyDiff(anchor=anchor), schedule=schedule)
