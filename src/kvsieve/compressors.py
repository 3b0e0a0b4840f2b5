"""What happens to slots that may not stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.allocators import top_mask
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Signal
from kvsieve.scoring import projected_l1
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True)
class Evict:
    """Drop everything but the highest-scored slots of each head; survivors stay in order."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep the ``counts [B, H]`` best of ``scores [B, H, S]``; ties go to the earlier slot."""
        keep_best(store, scores, counts)


def keep_best(store: Store, scores: Tensor, counts: Tensor) -> Tensor:
    """Keep the best ``counts`` slots of every head, in slot order; return which they were.

    ``[B, H, largest count]``; behind a head's own count, entries are meaningless.
    """
    index = best_slots(scores, counts)
    store.keep(index, counts)
    return index


def best_slots(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the best ``counts [B, H]`` slots of every head, in slot order (see ``keep_best``)."""
    chosen = top_mask(scores, counts.to(scores.device))
    # Unchosen slots sort behind the chosen ones; the store reads only the first `counts`.
    slots = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    ordered = slots.masked_fill(~chosen, scores.shape[-1]).sort(-1).values
    width = int(counts.max()) if counts.numel() else 0
    return ordered[..., :width].clamp_max(scores.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class TwoStage:
    """Keep a first share by score, the rest by score times projected value (CriticalKV).

    ``first``: share of a head's slots that the score alone decides; ``floor``: the least number
    decided so, as a share of the mean count; ``epsilon``: added to scores in the second stage.
    """

    first: float = 0.5
    epsilon: float = 1e-4
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise RecipeError(f"first={self.first}: the first stage is a share from 0 to 1.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.W_O, Signal.VALUES})

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep ``counts [B, H]`` slots in two stages; protected slots (+inf) always stay."""
        mean = counts.sum(1, keepdim=True) / counts.shape[1]
        certain = torch.maximum((counts * self.first).long(), (mean * self.floor).long())
        first = top_mask(scores, torch.minimum(certain, counts).to(scores.device))
        weighted = (scores + self.epsilon) * projected_l1(step, store)
        # Infinite scores stay what they are: protected, or no slot at all.
        weighted = torch.where(scores.isinf(), scores, weighted)
        keep_best(store, weighted.masked_fill(first & ~scores.isneginf(), torch.inf), counts)


@dataclass(frozen=True, kw_only=True)
class KeepChunks:
    """Keep whole chunks of ``length`` tokens, the same in all heads of a layer (ChunkKV).

    Heads must have equal counts and hold the same tokens. The last chunk may be cut.
    """

    length: int = 20

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RecipeError(f"length={self.length}: a chunk must hold 1 token or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep ``counts [B, H]`` slots: protected ones, then chunk by chunk from their start."""
        keep_best(store, self.shared(scores, store["position"]), counts)

    def shared(self, scores: Tensor, position: Tensor) -> Tensor:
        """Give each slot of ``scores [B, H, S]`` the mean of its chunk over slots and heads.

        Infinite scores stay what they are, and have no part in the mean.
        """
        missing = scores.isneginf()
        chunk = (
            (position // self.length).long().expand_as(scores).masked_fill(missing, 0).flatten(1)
        )
        counted = scores.isfinite()
        # A sum of condemned slots' scores must not become infinite.
        largest = torch.finfo(torch.float32).max / scores[0].numel()
        finite = scores.clamp(-largest, largest).masked_fill(~counted, 0.0).flatten(1)
        sums = finite.new_zeros(len(scores), int(chunk.max()) + 1)
        total = sums.scatter_add(1, chunk, finite)
        number = sums.scatter_add(1, chunk, counted.flatten(1).float()).clamp_min(1)
        mean = (total / number).gather(1, chunk).view_as(scores)
        return torch.where(counted, mean, scores)
