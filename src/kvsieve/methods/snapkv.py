"""SnapKV: what the last queries of the prompt attend to is what the answer will need ("SnapKV: LLM
Knows What You are Looking for Before Generation", arXiv 2404.14469).

    score_i = mean over the group of pool_i( mean over the last W queries t of A[t, i] )

A: softmax attention over all slots; pool: average (or maximum) over ``kernel`` neighbouring slots
before the window. The W window tokens stay.

Differs from the paper: the mean over the window replaces the paper's sum (the same order). The
released code pools by maximum or average depending on the script; here ``pooling`` chooses. The
group is averaged, as in kvpress; microsoft/G-KV's setting of this name takes its maximum, which is
r-kv with ``importance=1``.
"""

from __future__ import annotations

from kvsieve.compose import Recipe
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scorers import WindowAttention
from kvsieve.scoring import Pooling


@method(
    name="snapkv",
    paper="SnapKV",
    year=2024,
    arxiv="2404.14469",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    engines=("transformers", "vllm"),
)
def snapkv(*, window: int = 32, kernel: int = 5, pooling: Pooling = "avg") -> Recipe:
    """``window``: observed (and protected) last tokens; ``kernel``, ``pooling``: smoothing."""
    scorer = WindowAttention(queries=window, kernel=kernel, pooling=pooling)
    return Recipe(method="snapkv", scorer=scorer, schedule=AfterPrefill(), recent=window)
