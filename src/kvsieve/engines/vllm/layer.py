"""What follows a layer's attention in vLLM: remember queries, compact the requests that are due."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.engines.vllm.beside import Beside, Writes, grouped
from kvsieve.engines.vllm.compaction import compact
from kvsieve.engines.vllm.layouts import Tiles
from kvsieve.engines.vllm.metrics import Tally
from kvsieve.engines.vllm.plan import Event, Plan, Row
from kvsieve.step import LayerInfo, Step


@dataclass(kw_only=True)
class Work:
    """One forward, for all layers: the plan, the logical block table, queries to remember.

    ``table [rows, columns]`` is vLLM's own; ``gone``: requests whose state ends before this
    forward; ``place``: each row's place in the rings; ``places``: how many there are; ``blocks``:
    by row, what layers looked up and need again.
    """

    plan: Plan
    table: Tensor
    gone: list[str]
    writes: Writes | None = None
    place: dict[str, int] = field(default_factory=dict)
    places: int = 0
    blocks: dict[int, Tensor] = field(default_factory=dict)


class LayerSieve:
    """One attention layer under a recipe.

    ``heads``: KV heads of this worker; ``scale``, ``sinks [H, G]``, ``softcap``: as the layer
    attends.
    """

    def __init__(
        self,
        recipe: Recipe,
        info: LayerInfo,
        tiles: Tiles,
        tally: Tally,
        *,
        heads: int,
        scale: float,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        poison: bool = False,
    ) -> None:
        assert recipe.scorer is not None, "only recipes that compress come here"
        self.recipe, self.info, self.tiles, self.tally = recipe, info, tiles, tally
        self.scorer, self.heads, self.poison = recipe.scorer, heads, poison
        self.scale, self.sinks, self.softcap = scale, sinks, softcap
        self.beside = Beside(recipe.scorer, heads)

    def after_attention(self, query: Tensor, cache: Tensor, work: Work) -> None:
        """Follow one forward: ``query [tokens, Hq, D]`` after rotation, ``cache`` the layer's."""
        self.beside.forget(work.gone)
        if work.writes is not None:
            self.beside.push(query, work.writes, work.places)
        due = {event.row.index: event for event in work.plan.events}
        for row in work.plan.rows:
            wanted = self.scorer.moments is not None and row.prefill
            if row.index not in due and not wanted:
                continue
            start = time.perf_counter()
            step = self._step(row, query, work)
            self.beside.observe(row, step)
            if row.index in due:
                removed = self.compact(cache, due[row.index], step, work)
                self.tally.compacted(
                    self.info.ordinal, removed, time.perf_counter() - start, self.beside
                )
        self.finish(cache, work)

    def compact(self, cache: Tensor, event: Event, step: Step, work: Work) -> int:
        """Compact one request; return the slots removed from each head."""
        table = work.table[event.row.index]
        return compact(self.recipe, self.beside, self.tiles, cache, event, step, table, self.poison)

    def finish(self, cache: Tensor, work: Work) -> None:
        """Do what is done once for all requests of a forward, if anything."""

    def _step(self, row: Row, query: Tensor, work: Work) -> Step:
        short = 0 < row.tokens < self.scorer.window
        positions = torch.arange(row.n0, row.n1, device=query.device)
        return Step(
            layer=self.info,
            query=grouped(query[row.start : row.stop], self.heads),
            scale=self.scale,
            positions=positions[None],
            prefill=row.prefill,
            sinks=self.sinks,
            softcap=self.softcap,
            recent=self.beside.remembered(row, work.place[row.key]) if short else None,
        )
