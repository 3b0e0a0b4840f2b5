"""Q-Filters: queries of a head point one way, so that a key's projection on that direction tells
how much attention to expect ("Q-Filters: Leveraging QK Geometry for Efficient KV Cache
Compression", arXiv 2503.02812).

    offline:  Q = U Sigma V^T for the queries Q [N, D] of each query head on calibration text
              v = first right singular vector, turned so that the mean query projects positively
              f = mean of v over the query heads of a KV head
    score_i = f . k_i

k_i: cached key, Q: queries as they meet it, both after rotation. `kvsieve calibrate` measures f,
``stats=FILE`` takes it. O(S D) per event, in time; no query is looked at.

Differs from the paper: v is the main eigenvector of the second moment of all queries read (the
released code takes 3000 of them and their SVD); its sign is that of the mean projection, the
released code's that of the majority. Released filters are stored with the sign turned round, and
kvpress scores ``-f . k`` with them: the same score. The first tokens of a passage are left out of
Q. The paper's recent window (64 in its code) is ``recent``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.statistics import Statistics, needed, read
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class QFilter(ScorerDefaults):
    """Projection of keys on the direction of calibrated queries, ``[B, H, S]``."""

    statistics: Statistics | None = None

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.STATISTICS})

    def score(self, step: Step, store: Store) -> Tensor:
        given = needed(self.statistics, "q-filters")
        keys = store.keys
        direction = given.of("query_filter", step.layer.ordinal, keys.device)  # [H, D]
        B, H, S, D = keys.shape
        scores = torch.empty(B, H, S, device=keys.device)
        for s0, s1 in query_blocks(S, B * H * D, layer_block(keys)):
            scores[:, :, s0:s1] = (keys[:, :, s0:s1].float() @ direction[:, :, None]).squeeze(-1)
        return scores


@method(
    name="q-filters",
    paper="Q-Filters",
    year=2025,
    arxiv="2503.02812",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
)
def q_filters(
    *,
    stats: str | os.PathLike[str] | Statistics | None = None,
    recent: int | float = 64,
    interval: int = 128,
) -> Recipe:
    """``stats``: a file of `kvsieve calibrate` for this model; ``recent``: protected last tokens;
    ``interval``: decode steps between two compressions.
    """
    return Recipe(
        method="q-filters",
        scorer=QFilter(statistics=read(stats, "query_filter")),
        schedule=AfterPrefill() | Every(interval),
        recent=recent,
    )
