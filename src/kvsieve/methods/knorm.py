"""Knorm: keys of small norm attract attention, so keep those ("A Simple and Effective L2
Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430).

    score_i = -||k_i||₂

k_i: the i-th cached key. Per head; looks at nothing but the key, so that scores never change.

Differs from the paper: the paper leaves layers 0 and 1 uncompressed; here all layers are alike.
On models with key normalisation (Qwen3) all norms are nearly equal and the score means little.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Knorm(ScorerDefaults):
    """Minus the key's norm, ``[B, H, S]``."""

    def score(self, step: Step, store: Store) -> Tensor:
        return -store.keys.float().norm(dim=-1)


@method(
    name="knorm",
    paper="L2 norm",
    year=2024,
    arxiv="2406.11430",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    engines=("transformers", "vllm"),
)
def knorm(*, interval: int = 128) -> Recipe:
    """``interval``: decode steps between two compressions."""
    return Recipe(method="knorm", scorer=Knorm(), schedule=AfterPrefill() | Every(interval))
