"""Merging the values of evicted slots into slots that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.allocators import top_mask
from kvsieve.compressors import best_slots
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, Scorer, Signal
from kvsieve.packing import live_slots
from kvsieve.reconstruction import value_blocks
from kvsieve.sketch import uniform
from kvsieve.step import Step
from kvsieve.store import Store

RECEIVED = "received"


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A scorer whose scores stay readable, in column ``received``: those of protected slots too."""

    inner: Scorer

    @property
    def needs(self) -> frozenset[Signal]:
        return self.inner.needs

    @property
    def columns(self) -> tuple[Column, ...]:
        return (*self.inner.columns, Column(name=RECEIVED))

    @property
    def window(self) -> int:
        return self.inner.window

    @property
    def moments(self) -> int | None:
        return self.inner.moments

    def observe(self, step: Step, store: Store) -> None:
        """Let the inner scorer observe."""
        self.inner.observe(step, store)

    def score(self, step: Step, store: Store) -> Tensor:
        """Return the inner scorer's scores, and note them."""
        scores = self.inner.score(step, store)
        store[RECEIVED] = scores
        return scores


@dataclass(frozen=True, kw_only=True)
class MergeValues:
    """Evict, and add some of the evicted values to those of the slots that follow (CaM).

    With s the scores that ``Noted`` left, not negative, an evicted slot i is merged with
    probability ``min(1, s_i / max over kept j of s_j)``: ``v_i / span`` is added to each of the
    next ``span`` slots that stay (fewer, where fewer follow). The draw depends on ``seed``, layer,
    head and position.
    """

    span: int
    seed: int

    def __post_init__(self) -> None:
        if self.span < 1:
            raise RecipeError(f"span={self.span}: a value is merged into 1 slot or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES})

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep the ``counts [B, H]`` best of ``scores [B, H, S]``, with the others' values."""
        kept = top_mask(scores, counts.to(scores.device))
        merged = self._drawn(step, store, kept)
        index = best_slots(scores, counts)
        added = self._added(store, kept, merged, index.shape[-1])
        store.keep(index, counts)
        store.add_to_values(added)

    def _drawn(self, step: Step, store: Store, kept: Tensor) -> Tensor:
        """Return which slots are merged, bool ``[B, H, S]``."""
        received = store[RECEIVED]
        most = received.masked_fill(~kept, 0.0).amax(-1, keepdim=True)
        drawn = uniform(store["position"], step.layer.ordinal, kept.shape[1], self.seed)
        # No division: where nothing kept received anything, everything evicted that did is merged.
        return live_slots(store) & ~kept & (drawn * most < received)

    def _added(self, store: Store, kept: Tensor, merged: Tensor, width: int) -> Tensor:
        """Return what is added to the kept slots' values, ``[B, H, width, Dv]`` in fp32."""
        place = kept.long().cumsum(-1)  # of an evicted slot: the rank of the next that stays
        B, H, _, Dv = store.values.shape
        sums = torch.zeros(B, H, width + 1, Dv, dtype=torch.float64, device=kept.device)
        for s0, s1, block in value_blocks(store):
            given = block.masked_fill(~merged[:, :, s0:s1, None], 0.0).double() / self.span
            rank = place[:, :, s0:s1].clamp_max(width)[..., None].expand_as(given)
            sums.scatter_add_(2, rank, given)
        # Slot r takes what was given at the ranks r - span + 1 .. r.
        total = sums[:, :, :width].cumsum_(2)
        added = total.clone()
        added[:, :, self.span :] -= total[:, :, : max(0, width - self.span)]
        return added.float()
