"""CaM: tokens that are evicted leave a part of their values behind ("CaM: Cache Merging for
Memory-efficient LLMs Inference", ICML 2024). Wraps a method that scores by attention received.

    p_i = min(1, s_i / max over kept j of s_j),   M_i ~ Bernoulli(p_i)   for every evicted token i
    v_j <- v_j + M_i v_i / m                      for the m kept tokens j that follow i

s: attention received so far, as h2o sums it (or tova's); m: ``span``. Keys, and which tokens stay,
are those of the method that is wrapped. Beside it, an event costs O(S D) in time, and O(b D) and a
block of slots in memory.

Differs from the paper: after public code, where tokens are evicted one at a time, from a window
that moves on, and the maximum goes over what is kept then; here all that an event evicts is drawn
and merged at once, by the scores of that event, into the slots that stay after it. m is the
window's size there. The group is averaged. The draw depends on seed, layer, head and position, so
that a row keeps the same values alone and in a batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError, choices
from kvsieve.merging import MergeValues, Noted
from kvsieve.registry import find, method

_SCORERS = ("h2o", "tova")


@method(name="cam", paper="CaM", year=2024, arxiv=None, certainty="code", wraps=True)
def cam(*, scorer: str = "h2o", span: int = 32, seed: int = 0, **options: Any) -> Recipe:
    """``scorer``: h2o or tova, with its own options; ``span``: slots that share a merged value."""
    if scorer not in _SCORERS:
        raise RecipeError(
            f"cam(scorer={scorer!r}): it weighs evicted tokens against kept ones by the attention "
            f"they received. {choices(scorer, _SCORERS)}"
        )
    inner = find(scorer).build(**options)
    assert inner.scorer is not None, "h2o and tova have scorers"
    return dataclasses.replace(
        inner,
        method="cam",
        scorer=Noted(inner=inner.scorer),
        compressor=MergeValues(span=span, seed=seed),
    )
