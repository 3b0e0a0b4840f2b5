"""One compaction of one layer: read a request's blocks, let the recipe decide, write back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.decision import Decision
from kvsieve.engines.vllm.beside import Beside
from kvsieve.engines.vllm.plan import Event
from kvsieve.forward import Forward, LayerState, Pending
from kvsieve.step import Step


class Tiles(Protocol):
    """How a backend lays slots out inside its blocks."""

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[1, H, P b, D]`` of ``blocks [P]``."""
        ...

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values [1, H, P b, D]`` into ``blocks [P]``, whole blocks."""
        ...

    def poison(self, cache: Tensor, blocks: Tensor) -> None:
        """Make ``blocks [P]`` unusable: whoever reads them gets NaN."""
        ...


def compact(
    recipe: Recipe,
    beside: Beside,
    tiles: Tiles,
    cache: Tensor,
    event: Event,
    step: Step,
    table: Tensor,
    poison: bool = False,
) -> int:
    """Compact one request in one layer's ``cache``; return the slots removed from each head.

    ``table``: the request's row of the logical block table. Budget, protection, allocation and
    compression are ``Decision``'s, the same as in the Transformers engine; the newest tokens, in no
    whole column, stay where they are.

    Raises:
        RecipeError: scores that are NaN.
    """
    scorer, budget = recipe.scorer, recipe.budget
    assert scorer is not None and budget is not None, "only recipes that compress come here"
    kept = int(budget.value)
    sources = blocks_at(table, event.sources)
    keys, values = tiles.read(cache, sources)
    store = beside.store(event, keys, values)
    scores = scorer.score(step, store)
    layer = LayerState(info=step.layer, store=store)
    decision = Decision(recipe, [layer], event.row.prompt)
    forward = Forward(T=event.row.tokens, due=True, rows=torch.ones(1, dtype=torch.bool))
    decision.decide(forward, [Pending(ordinal=0, scores=scores, step=step)])
    target = sources[: event.kept_columns]
    tiles.write(cache, target, store.keys[:, :, :kept], store.values[:, :, :kept])
    beside.keep(event, store)
    if poison:
        tiles.poison(cache, blocks_at(table, event.vacated))
    return event.slots - store.slots


def blocks_at(table: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Return the blocks of a request's logical ``columns``, ``[P]`` int64."""
    return table[torch.tensor(columns, dtype=torch.int64, device=table.device)].long()
