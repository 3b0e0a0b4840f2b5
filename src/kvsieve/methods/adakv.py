"""AdaKV: heads of a layer share its budget by one top-k over all of them ("Ada-KV: Optimizing KV
Cache Eviction by Adaptive Budget Allocation", arXiv 2407.11550). Wraps any method's scorer.

    keep the H b highest scores of the layer; every head keeps at least its own best floor * b

H: KV heads, b: mean budget, floor: safeguard (0.2).

Differs from the paper: one algorithm of the paper prints alpha as the share of the adaptive part;
its text and code, and this file, use it as the guaranteed, uniform share. Where floor * b is below
one slot there is no safeguard (kvpress then guarantees one).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvsieve.allocators import TopK
from kvsieve.compose import Recipe
from kvsieve.compressors import KeepChunks, TwoStage
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Scope
from kvsieve.registry import find, method


@method(
    name="adakv",
    paper="Ada-KV",
    year=2024,
    arxiv="2407.11550",
    certainty="code",
    oracle="kvpress 0.5.5",
    wraps=True,
)
def adakv(*, scorer: str = "snapkv", floor: float = 0.2, **options: Any) -> Recipe:
    """``scorer``: the method whose scores are used, with its own options; ``floor``: safeguard."""
    inner = find(scorer).build(**options)
    if not inner.even:
        raise RecipeError(
            f"adakv(scorer={scorer!r}): it shares a layer's budget between heads by their scores, "
            f"but {scorer!r} {'has no scores' if not inner.compresses else 'allocates itself'}. "
            "Use a method of scope 'head', such as snapkv, h2o, keydiff or g-kv."
        )
    compressor = inner.compressor
    if isinstance(compressor, KeepChunks):
        raise RecipeError(
            f"adakv(scorer={scorer!r}): its heads keep the same slots, none unevenly."
        )
    if isinstance(compressor, TwoStage):
        compressor = dataclasses.replace(compressor, floor=floor)
    allocator = TopK(scope=Scope.LAYER, floor=floor)
    return dataclasses.replace(
        inner, method="adakv", allocator=allocator, compressor=compressor, layout="ragged"
    )
