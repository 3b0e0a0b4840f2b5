"""PyramidKV: SnapKV's score with budgets that fall from the first to the last layer ("PyramidKV:
Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069).

    least = (b - W) / beta,  most = 2 (b - W) - least
    layer l of L keeps  W + most - l (most - least) / (L - 1)

b: mean budget, W: window. ``most`` is cut to the prompt without the window; ``least`` takes the
rest.

Differs from the paper: layer budgets are rounded so that together they are exactly L b. kvpress
rounds each by itself, puts the window inside ``most`` and ``least``, and gives all layers the same
where ``least`` is below W; here W comes on top, and every pyramid stands.
"""

from __future__ import annotations

from kvsieve.allocators import Pyramid
from kvsieve.compose import Recipe
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scorers import WindowAttention
from kvsieve.scoring import Pooling


@method(
    name="pyramidkv",
    paper="PyramidKV",
    year=2024,
    arxiv="2406.02069",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
)
def pyramidkv(
    *, window: int = 32, kernel: int = 5, pooling: Pooling = "avg", beta: float = 20.0
) -> Recipe:
    """``window``, ``kernel``, ``pooling`` as in snapkv; ``beta``: steepness of the pyramid."""
    return Recipe(
        method="pyramidkv",
        scorer=WindowAttention(queries=window, kernel=kernel, pooling=pooling),
        allocator=Pyramid(beta=beta),
        schedule=AfterPrefill(),
        recent=window,
    )
