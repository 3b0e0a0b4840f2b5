"""Random eviction: the lower anchor of every comparison.

    score_i = a uniform number in [0, 1) drawn for (seed, layer, head, position i)

Differs from the paper: there is no paper. The number depends on the token's position only, so that
a sequence keeps the same slots alone, in a batch, and in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store

_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


@dataclass(frozen=True, kw_only=True)
class Random(ScorerDefaults):
    """Uniform numbers from an integer hash, ``[B, H, S]``."""

    seed: int = 0

    def score(self, step: Step, store: Store) -> Tensor:
        position = store["position"].long()
        B, H = store.counts.shape
        head = torch.arange(H, device=position.device)[:, None] + 1
        x = position * _MIX[0] + head * _MIX[1] + (step.layer.ordinal + 1) * _MIX[2] + self.seed
        for factor in (0x7FEB352D, 0x846CA68B):
            x = x & 0xFFFFFFFF
            x = (x ^ (x >> 16)) * factor
        x = x & 0xFFFFFFFF
        # 24 bits: what fp32 holds exactly, so that 1 is never reached.
        return (((x ^ (x >> 16)) >> 8).float() / 2**24).expand(B, H, -1)


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
