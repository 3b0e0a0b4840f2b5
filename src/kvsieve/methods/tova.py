"""TOVA: keep what the last query attends to, one token set for all heads of a layer ("Transformers
are Multi-State RNNs", arXiv 2401.06104).

    score_i = mean over all query heads of the layer of A[last, i]

A: softmax attention. After the prompt the best b tokens stay; at each decode step the lowest goes.

Differs from the paper: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, EachStep
from kvsieve.scoring import window_mean
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class LastAttention(ScorerDefaults):
    """Attention of the last query, mean over all heads of the layer, ``[B, H, S]``."""

    @property
    def window(self) -> int:
        return 1

    def score(self, step: Step, store: Store) -> Tensor:
        attention = window_mean(step, store, 1)  # [B, H, G, S]
        return attention.mean((1, 2))[:, None].expand(*store.counts.shape, -1)


@method(
    name="tova",
    paper="TOVA",
    year=2024,
    arxiv="2401.06104",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    engines=("transformers", "vllm"),
)
def tova() -> Recipe:
    """No options: the last token is protected."""
    schedule = AfterPrefill() | EachStep()
    return Recipe(method="tova", scorer=LastAttention(), schedule=schedule, recent=1)
