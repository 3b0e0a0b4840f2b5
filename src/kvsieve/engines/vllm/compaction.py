"""One compaction of one layer: read a request's blocks, let the recipe decide, write back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.decision import Decision
from kvsieve.engines.vllm.beside import Beside
from kvsieve.engines.vllm.layouts import Tiles
from kvsieve.engines.vllm.plan import Event
from kvsieve.forward import Forward, LayerState, Pending
from kvsieve.step import Step
from kvsieve.store import Store


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
    assert recipe.budget is not None, "only recipes that compress come here"
    kept = int(recipe.budget.value)
    sources = blocks_at(table, event.sources)
    keys, values = tiles.read(cache, sources)
    store = beside.store(event, keys, values)
    decide(recipe, store, event, step)
    target = sources[: event.kept_columns]
    tiles.write(cache, target, store.keys[:, :, :kept], store.values[:, :, :kept])
    beside.keep(event, store)
    if poison:
        tiles.poison(cache, blocks_at(table, event.vacated))
    return event.slots - store.slots


def decide(recipe: Recipe, store: Store, event: Event, step: Step) -> None:
    """Score a request's slots in one layer and drop from ``store`` what has to go.

    Raises:
        RecipeError: scores that are NaN.
    """
    assert recipe.scorer is not None, "only recipes that compress come here"
    scores = recipe.scorer.score(step, store)
    layer = LayerState(info=step.layer, store=store)
    decision = Decision(recipe, [layer], event.row.prompt)
    forward = Forward(T=event.row.tokens, due=True, rows=torch.ones(1, dtype=torch.bool))
    decision.decide(forward, [Pending(ordinal=0, scores=scores, step=step)])


def blocks_at(table: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Return the blocks of a request's logical ``columns``, ``[P]`` int64."""
    return table[torch.tensor(columns, dtype=torch.int64, device=table.device)].long()
