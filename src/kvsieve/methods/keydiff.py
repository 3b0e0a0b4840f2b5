"""KeyDiff: keys that point away from the mean direction matter; no attention needed ("KeyDiff: Key
Similarity-Based KV Cache Eviction for Long-Context LLM Inference", arXiv 2504.15364).

    score_i = -cos(k_i, m),   m = mean over the cached slots of k_j / ||k_j||

Equal in order to minus the total cosine similarity with all cached keys. O(S D) per event.

Differs from the paper: keys of a prompt that comes in one forward are scored once at its end; feed
it in chunks (``prefill_chunk_size``, 128 in the paper) for the paper's bounded prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScorerDefaults):
    """Minus the cosine to the mean key direction, ``[B, H, S]``."""

    def score(self, step: Step, store: Store) -> Tensor:
        unit = F.normalize(store.keys.float(), dim=-1)
        if store.live is not None:
            unit = unit.masked_fill(~store.live[..., None], 0.0)
        count = store.counts.to(unit.device)[..., None, None]
        anchor = unit.sum(2, keepdim=True) / count  # [B, H, 1, D]
        return -F.cosine_similarity(unit, anchor, dim=-1)


@method(
    name="keydiff",
    paper="KeyDiff",
    year=2025,
    arxiv="2504.15364",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
)
def keydiff(*, interval: int = 128) -> Recipe:
    """``interval``: decode steps between two compressions."""
    return Recipe(method="keydiff", scorer=KeyDiff(), schedule=AfterPrefill() | Every(interval))
