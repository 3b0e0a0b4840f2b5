"""No compression: every slot is kept. The reference that all other methods are measured against.

Differs from the paper: there is no paper.
"""

from __future__ import annotations

from kvsieve.compose import Recipe
from kvsieve.registry import method


@method(
    name="full",
    paper="No compression",
    year=None,
    arxiv=None,
    certainty="own",
    chunk_invariant=True,
)
def full() -> Recipe:
    """Return the recipe that keeps everything."""
    return Recipe(method="full")
