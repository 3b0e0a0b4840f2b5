"""CriticalKV: attention decides half of the budget, attention times projected value the rest
("Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", arXiv
2502.03805). Wraps any method's scorer.

    first stage:  the best ``first * n`` slots by the base score s
    second stage: the rest by  (s_i + epsilon) * mean over the group of || v_i W_O ||_1

n: the head's slots, v: value, W_O: its rows of the output projection.

Differs from the paper: protected slots (the base method's window) stay for sure; kvpress weighs
them in the second stage like the others. With adakv around it, counts come from the base scores and
the first stage keeps at least the safeguard, as in kvpress.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvsieve.compose import Recipe
from kvsieve.compressors import Evict, KeepChunks, TwoStage
from kvsieve.errors import RecipeError
from kvsieve.registry import find, method


@method(
    name="criticalkv",
    paper="CriticalKV",
    year=2025,
    arxiv="2502.03805",
    certainty="code",
    oracle="kvpress 0.5.5",
    wraps=True,
)
def criticalkv(
    *, scorer: str = "snapkv", first: float = 0.5, epsilon: float = 1e-4, **options: Any
) -> Recipe:
    """``scorer``: base method, with its own options; ``first``: share of the first stage."""
    inner = find(scorer).build(**options)
    if not inner.compresses:
        raise RecipeError(f"criticalkv(scorer={scorer!r}): that method has no scores.")
    if inner.dynamic:
        raise RecipeError(f"criticalkv(scorer={scorer!r}): that method chooses its own budget.")
    if isinstance(inner.compressor, KeepChunks):
        raise RecipeError(
            f"criticalkv(scorer={scorer!r}): it keeps chunks whole, not in two stages."
        )
    if not isinstance(inner.compressor, Evict | TwoStage):
        raise RecipeError(f"criticalkv(scorer={scorer!r}): that method has stages of its own.")
    compressor = TwoStage(first=first, epsilon=epsilon)
    return dataclasses.replace(inner, method="criticalkv", compressor=compressor)
