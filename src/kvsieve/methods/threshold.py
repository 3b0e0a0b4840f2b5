"""Threshold eviction in the manner of DMS: what scores below tau goes, once it is no longer recent
("Inference-Time Hyper-Scaling with KV Cache Compression", arXiv 2506.05345). Wraps any method's
scorer.

    keep slot i of head h  <=>  s_hi >= tau,  or i is among the last ``delay`` tokens

s: the base method's scores; tau: ``threshold``, on their scale. How much stays is an outcome: heads
and layers come to unequal lengths. The budget is a cap (100% if left out): where more is good
enough, the best of it stays, as the base method shares a budget. Beside the base scores O(H S).

Differs from the paper: DMS trains one neuron per head to decide; here scores of untrained methods
stand in, as in kvpress (which scores a token once, and marks it instead of freeing its slot). All
slots are scored anew whenever the base method's schedule is due; with "each-step" a token is judged
as soon as it leaves the window. A head keeps one slot at least.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvsieve.allocators import Threshold
from kvsieve.compose import Recipe
from kvsieve.compressors import Evict
from kvsieve.errors import RecipeError
from kvsieve.registry import find, method


@method(
    name="threshold",
    paper="DMS-type threshold",
    year=2025,
    arxiv="2506.05345",
    certainty="code",
    oracle="kvpress 0.5.5",
    wraps=True,
)
def threshold(
    *, scorer: str = "keydiff", threshold: float = -0.8, delay: int = 128, **options: Any
) -> Recipe:
    """``scorer``: the method whose scores are used, with its own options; ``threshold``: tau, on
    the scale of those scores (keydiff's go from -1 to 1; -inf drops nothing); ``delay``: recent
    tokens that are not judged yet.
    """
    inner = find(scorer).build(**options)
    if not inner.compresses or inner.dynamic or not isinstance(inner.compressor, Evict):
        reason = "chooses slots its own way" if inner.compresses else "has no scores"
        raise RecipeError(
            f"threshold(scorer={scorer!r}): slots go by their scores alone, but {scorer!r} "
            f"{reason}. Use a method that evicts by score, as keydiff, snapkv, h2o or kvzip."
        )
    if "recent" in options:
        raise RecipeError("threshold: give delay, the tokens not judged yet, instead of recent.")
    window = inner.recent if isinstance(inner.recent, int) else 0
    return dataclasses.replace(
        inner,
        method="threshold",
        allocator=Threshold(least=threshold, within=inner.allocator),
        layout="ragged",
        # An observation window of the base method has no scores.
        recent=max(delay, window),
    )
