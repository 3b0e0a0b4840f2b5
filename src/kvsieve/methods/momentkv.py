"""MomentKV: what was evicted is remembered by its moments, and attention adds it back ("MomentKV:
Closing the Directional Gap in KV Cache Eviction for Long-Context Inference", arXiv 2606.01563).

    score_i = a_i * || v_i - U U^T v_i ||_2
    with the moments n, mu_k, mu_v, C of all tokens that the head evicted, for every query q
    g = sigmoid(log n + q . mu_k / sqrt d - lse)
    o = (1 - g) o_kept + g (mu_v + C q / sqrt d)

a: attention of the last W queries as in snapkv; U: spans mu_v and the first ``rank`` left singular
vectors of ``C = (1/n) sum_i (v_i - mu_v)(k_i - mu_k)^T``; lse, o_kept: log-sum-exp and output of
attention over what is kept. A value inside U is one that the summary can give back: it goes
first. Each event evicts in ``rounds``, the summary taking in one round before the next is scored;
while nothing is summarised, score_i = a_i ||v_i||. The first ``sinks`` tokens and the window stay.

The state is 1 + d + d_v + d d_v numbers in fp32 per head and summary, as much as some 130 tokens
in bf16 at d = 128: budgets in bytes pay for it, budgets in slots don't. An event costs a singular
value decomposition of C per round and head, O(d^3), and O(S d rank) time in blocks of slots; a
query O(d d_v) beside its attention, which is written out (no fused kernel).

Differs from the paper: re-implementation from its abstract and from secondary descriptions, which
give the statistics, "attention times the norm of the residual to a summary subspace", and the term
C q / sqrt d; subspace, rounds, pooling, sinks and all defaults are ours. ``residual`` names other
readings: "centre" (v - mu_v against the singular vectors alone), "cosine" (1 - |cos(v, mu_v)|),
"none" (attention alone). ``summaries``: more than one per head, each of a stretch of positions
(ours: one is coarse where keys spread). ``correct=False`` leaves attention as it is. Keys are as
cached, after rotation. In later turns a is taken over what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.compressors import Evict, keep_best
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Signal
from kvsieve.reconstruction import Residual, unexplained
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scorers import WindowAttention
from kvsieve.scoring import Pooling
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.summary import Summarise


@dataclass(frozen=True, kw_only=True)
class EvictExplained:
    """Evict in rounds what the summary of evicted slots explains, and attention needs least."""

    kind: Residual
    rank: int
    rounds: int

    def __post_init__(self) -> None:
        if self.kind not in ("subspace", "centre", "cosine"):
            raise RecipeError(
                f"momentkv: residual={self.kind!r}; possible: subspace, centre, cosine, none."
            )
        if self.rank < 0 or self.rounds < 1:
            raise RecipeError("momentkv: rank must be 0 or more, rounds 1 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES})

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep ``counts [B, H]`` slots; infinite scores (protected, missing) stay what they are."""
        before = store.counts
        for done in range(1, self.rounds + 1):
            target = before - (before - counts) * done // self.rounds
            if bool((target == store.counts).all()):
                continue
            weighted = scores * unexplained(store, self.kind, self.rank)
            weighted = torch.where(scores.isinf(), scores, weighted)
            index = keep_best(store, weighted, target)
            there = torch.arange(index.shape[-1]) < target[:, :, None]
            scores = scores.gather(2, index).masked_fill(~there.to(index.device), -torch.inf)


@method(
    name="momentkv",
    paper="MomentKV",
    year=2026,
    arxiv="2606.01563",
    certainty="secondary description",
)
def momentkv(
    *,
    window: int = 32,
    kernel: int = 7,
    pooling: Pooling = "avg",
    residual: Literal["subspace", "centre", "cosine", "none"] = "subspace",
    rank: int = 8,
    rounds: int = 2,
    sinks: int = 4,
    correct: bool = True,
    summaries: int = 1,
) -> Recipe:
    """``window``, ``kernel``, ``pooling`` as in snapkv; ``residual``: what weighs the attention;
    ``rank``: singular vectors; ``correct``: add the evicted back; ``summaries`` per head."""
    scorer = WindowAttention(queries=window, kernel=kernel, pooling=pooling)
    plain = residual == "none"
    remembered = Summarise(added=correct, parts=summaries)
    return Recipe(
        method="momentkv",
        scorer=scorer,
        compressor=Evict() if plain else EvictExplained(kind=residual, rank=rank, rounds=rounds),
        schedule=AfterPrefill(),
        sinks=sinks,
        recent=window,
        summarise=None if plain and not correct else remembered,
    )
