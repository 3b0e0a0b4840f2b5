"""A layer whose kept slots are moved inside their blocks, all requests that are due at once.

The way of the GPU backends. What is kept is decided request by request, on columns alone; then the
rows of all of them are moved by one call. The result is that of ``layer.LayerSieve``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvsieve.compressors import Evict
from kvsieve.engines.vllm.compaction import blocks_at, decide
from kvsieve.engines.vllm.layer import LayerSieve, Work
from kvsieve.engines.vllm.layouts import Strided
from kvsieve.engines.vllm.plan import Event
from kvsieve.step import Step
from kvsieve.store.dense import Dense


class Noting(Dense):
    """A table that notes which slots are kept, ``[1, H, N]``, instead of copying keys and values.

    After ``keep`` it has columns, but no keys or values.
    """

    chosen: Tensor | None = None

    @classmethod
    def of(cls, table: Dense) -> Noting:
        """Take over a table."""
        made = cls()
        made.__dict__.update(table.__dict__)
        return made

    def keep(self, index: Tensor, counts: Tensor, spare: int) -> None:
        """See ``Dense``; called once."""
        assert self.chosen is None, "slots are numbered as they were before the first time"
        self.chosen = index
        self.keys, self.values = self.keys[..., :0], self.values[..., :0]
        super().keep(index, counts, spare)


@dataclass(frozen=True, kw_only=True)
class Move:
    """``slots [H, N]`` of an event's ``blocks [P]`` go to the front of them."""

    event: Event
    blocks: Tensor
    slots: Tensor


class MovingSieve(LayerSieve):
    """``LayerSieve`` for backends whose tiles are ``Strided``."""

    tiles: Strided

    def __init__(self, *args: Any, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.moves: list[Move] = []
        # Whoever changes keys or values has them written, not moved.
        self.plain = isinstance(self.recipe.compressor, Evict) and not self.recipe.rerotate

    def compact(self, cache: Tensor, event: Event, step: Step, work: Work) -> int:
        """Decide what a request keeps; it is moved once all requests of this layer have decided."""
        if not self.plain:
            return super().compact(cache, event, step, work)
        assert self.recipe.budget is not None, "only recipes that compress come here"
        blocks = _blocks(work, event)
        store = self.beside.store(event, *self.tiles.read(cache, blocks))
        assert isinstance(store.table, Dense), "as made"
        table = store.table = Noting.of(store.table)
        decide(self.recipe, store, event, step)
        assert table.chosen is not None, "an event removes something"
        kept = table.chosen[0, :, : int(self.recipe.budget.value)]
        self.moves.append(Move(event=event, blocks=blocks, slots=kept))
        self.beside.keep(event, store)
        return event.slots - store.slots

    def finish(self, cache: Tensor, work: Work) -> None:
        """Move what the requests of this forward keep."""
        moves, self.moves = self.moves, []
        if not moves:
            return
        blocks = pad_sequence([move.blocks for move in moves], batch_first=True)
        self.tiles.compact(cache, blocks, torch.stack([move.slots for move in moves]))
        if self.poison:
            for move in moves:
                vacated = blocks_at(work.table[move.event.row.index], move.event.vacated)
                self.tiles.poison(cache, vacated)


def _blocks(work: Work, event: Event) -> Tensor:
    """Return an event's blocks, looked up once for all layers: a copy to the device each time."""
    index = event.row.index
    if index not in work.blocks:
        work.blocks[index] = blocks_at(work.table[index], event.sources)
    return work.blocks[index]
