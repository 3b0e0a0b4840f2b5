"""StreamingLLM: the first tokens (attention sinks) and the most recent ones ("Efficient Streaming
Language Models with Attention Sinks", arXiv 2309.17453).

    keep slots 0 .. s-1 and the last b - s

s: sinks (4), b: budget.

Differs from the paper: the paper renumbers positions inside the cache before rotating; here every
token keeps the rotation of its true position, as in kvpress. ``rerotate=True`` is the paper's way.
"""

from __future__ import annotations

from kvsieve.compose import Recipe
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, EachStep
from kvsieve.scorers import Recency


@method(
    name="streaming-llm",
    paper="StreamingLLM",
    year=2023,
    arxiv="2309.17453",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    chunk_invariant=True,
    engines=("transformers", "vllm"),
)
def streaming_llm(*, sinks: int = 4) -> Recipe:
    """``sinks``: first tokens that always stay."""
    schedule = AfterPrefill() | EachStep()
    return Recipe(method="streaming-llm", scorer=Recency(), schedule=schedule, sinks=sinks)
