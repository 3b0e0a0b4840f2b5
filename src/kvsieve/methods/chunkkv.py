"""ChunkKV: tokens that stand together stay or go together ("ChunkKV: Semantic-Preserving KV Cache
Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299). Wraps any method's scorer.

    score of chunk c = mean over the slots i of c of ( sum over the KV heads of s_i )
    keep whole chunks, best first, the same for all heads of the layer

s: base scores; chunk c: the row's tokens ``c * length .. (c + 1) * length - 1``. O(H S) in time and
memory per event, beside the base method's.

Differs from the paper: the budget is met exactly, so that the last chunk that is kept may be cut:
its first tokens stay. Protected slots (the base method's window and sinks) always stay and have no
part in their chunk's score; kvpress gives them the highest score, which draws their chunk in.
Chunks are of token positions, so that an evicted token leaves its chunk smaller at later events.
The paper's sharing of one selection by neighbouring layers is not offered.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kvsieve.compose import Recipe
from kvsieve.compressors import Evict, KeepChunks
from kvsieve.errors import RecipeError
from kvsieve.registry import find, method


@method(
    name="chunkkv",
    paper="ChunkKV",
    year=2025,
    arxiv="2502.00299",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    wraps=True,
)
def chunkkv(*, scorer: str = "snapkv", length: int = 20, **options: Any) -> Recipe:
    """``scorer``: the method whose scores are used, with its own options; ``length`` of chunks."""
    inner = find(scorer).build(**options)
    if not inner.even or not isinstance(inner.compressor, Evict):
        reason = "chooses slots its own way" if inner.compresses else "has no scores"
        raise RecipeError(
            f"chunkkv(scorer={scorer!r}): a layer's heads keep the same chunks by score, "
            f"but {scorer!r} {reason}. Use a method of scope 'head', as snapkv, h2o or keydiff."
        )
    return dataclasses.replace(inner, method="chunkkv", compressor=KeepChunks(length=length))
