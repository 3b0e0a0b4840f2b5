"""LagKV: a token matters if it looks unlike the tokens that follow it; no attention needed ("LagKV:
Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv 2504.04704).

    slots after the sinks in chunks of ``lag``;  c: a channel of chunk j, c': of chunk j + 1
    x_i = (c_i - min c') / (max c' - min c')        for every channel of slot i of chunk j
    info_i = softmax over the chunk of (standard deviation over channels of x_i)
    score_i = rank of (key info_i + value info_i) / 2 in its chunk, from 0, divided by ``lag``

Every chunk so keeps the same share. ``cross_scoring`` leaves the ranks out, so that chunks (and,
under adakv, heads) compete. Above all of them, the newest first: the last whole chunk, which has
nothing after it to compare with, and what follows it. O(S D) in time and memory per event.

Differs from the paper: the paper compresses a chunk once, when its successor is complete; here all
cached slots are scored anew at every event, as in kvpress. Fewer than ``sinks + 2 lag`` slots, or a
budget below the part that is always kept, leave the most recent slots (the paper keeps everything).
A channel that is constant in chunk j + 1 counts as 0. Equal scores go to the earlier slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.packing import live_slots, pick, put_back, real_first
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class LagInformation(ScorerDefaults):
    """Spread of keys and values in the next chunk's range, ranked in the chunk, ``[B, H, S]``."""

    sinks: int = 4
    lag: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        if self.lag < 2:
            raise RecipeError(f"lagkv: lag={self.lag}; a chunk must hold 2 slots or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES})

    def score(self, step: Step, store: Store) -> Tensor:
        position = store["position"]
        inside = live_slots(store) & (position >= self.sinks)
        order = real_first(inside, store.counts.shape[1])
        seen = store.seen.to(position.device).clamp_min(1)[:, None, None]
        packed = pick((1 + position / seen).expand_as(order), order)  # newest first, above ranks
        chunks = store.slots // self.lag
        if chunks >= 2:
            compared = (chunks - 1) * self.lag
            info = self._information(store, order).flatten(2)  # [B, H, compared]
            # A table holds as many chunks as its fullest head; others have fewer.
            whole = inside.sum(-1, keepdim=True) // self.lag
            real = torch.arange(compared, device=info.device) < (whole - 1) * self.lag
            info = torch.where(real, info, packed[..., :compared])
            packed = torch.cat([info, packed[..., compared:]], -1)
        return put_back(packed, order)

    def _information(self, store: Store, order: Tensor) -> Tensor:
        """Score all chunks but the last, ``[B, H, chunks - 1, lag]``."""
        info = self._spread(pick(store.keys, order)) + self._spread(pick(store.values, order))
        if self.cross_scoring:
            return info / 2
        place = info.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (self.lag - 1 - place) / self.lag

    def _spread(self, x: Tensor) -> Tensor:
        """Softmax over each chunk of the deviation over channels, in the next chunk's range."""
        chunks = x.shape[2] // self.lag
        split = x[:, :, : chunks * self.lag].float().unflatten(2, (chunks, self.lag))
        low, high = split[:, :, 1:].aminmax(dim=3, keepdim=True)
        scaled = (split[:, :, :-1] - low) / (high - low)
        return scaled.masked_fill(high == low, 0.0).std(-1).softmax(-1)


@method(
    name="lagkv",
    paper="LagKV",
    year=2025,
    arxiv="2504.04704",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def lagkv(
    *, sinks: int = 4, lag: int = 128, cross_scoring: bool = False, interval: int = 128
) -> Recipe:
    """``lag``: slots of a chunk; ``cross_scoring``: chunks compete by their raw scores."""
    scorer = LagInformation(sinks=sinks, lag=lag, cross_scoring=cross_scoring)
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="lagkv", scorer=scorer, schedule=schedule, sinks=sinks)
