"""Compactor: keys that others can't replace, and keys that their neighbours look at ("Compactor:
Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores", arXiv 2507.08143).

    a_i = sum over the queries t of i's chunk of softmax over the chunk's keys of (q_t . k)
    m_i = pool_i( mean over the group of a_i * ||v_i||_2 )      average over 3 slots
    score = blend * z(l) + z(m)

In a chunk of ``chunk`` tokens attention is not causal: all its queries see all its keys. l: the
leverage scores of method ``leverage``; z: less the mean, divided by the deviation, over a row's
heads and slots. The first ``sinks`` and last ``recent`` tokens stay and have no part in l, z and
pool. a is a column, made as tokens come: O(S chunk D) in time; in memory O(H G chunk^2) and a copy
of queries and keys; the last ``chunk`` queries are remembered between the parts of a prompt.

Differs from the paper: the released code, as in kvpress: no 1 / sqrt d in a; Cholesky for l. There,
``blend`` is the share removed; a scorer doesn't know it, so that here it is a number. kvpress gives
padded keys of the last chunk a logit of nearly 0, and leaves the recent tokens out of their chunk;
here padding has no weight, and they count. Tokens whose queries are gone (decoded, or of an earlier
turn) keep the a they have; decoded ones have 1, the mean. For l see ``leverage``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, ScorerDefaults, Signal
from kvsieve.packing import lay_out, live_slots
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window, pool, standardise
from kvsieve.sketch import key_leverage
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Compactor(ScorerDefaults):
    """Leverage plus attention inside chunks times value norm, ``[B, H, S]``."""

    sinks: int = 8
    recent: int = 4
    chunk: int = 256
    sketch: int = 48
    blend: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sketch < 1:
            raise RecipeError("compactor: chunk and sketch must be 1 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.PRE_ROPE, Signal.VALUES})

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="looked_at", fill=1.0),)

    @property
    def window(self) -> int:
        return self.chunk

    def observe(self, step: Step, store: Store) -> None:
        """Fill the column for the chunks to which this prompt part adds queries."""
        if not step.prefill:
            return
        queries, place, first = self._queries(step)
        width = int(place.max() + self.chunk) // self.chunk * self.chunk
        if not width:
            return
        asked = lay_out(torch.ones_like(place)[:, None], place[:, None], width)[:, 0].bool()
        # A key without a query has its a from before: it belongs to no chunk of now.
        slot = store["position"].long() - self.sinks - first[:, None, None]
        slot = slot.masked_fill(~live_slots(store) | (slot < 0) | (slot >= width), -1)
        known = asked[:, None].expand(-1, slot.shape[1], -1).gather(2, slot.clamp_min(0))
        slot = slot.masked_fill(~known, -1).expand(*store.counts.shape, -1)
        keys = lay_out(store.keys, slot, width)
        present = lay_out(torch.ones_like(slot), slot, width).bool()
        B, H, G, N, D = queries.shape
        by_head = place[:, None].expand(B, H * G, N)
        grid = lay_out(queries.reshape(B, H * G, N, D), by_head, width).view(B, H, G, width, D)
        sums = keys.new_zeros(B, H, width, dtype=torch.float32)
        for start in range(0, width, self.chunk):
            span = slice(start, start + self.chunk)
            sums[:, :, span] = _column_sums(
                grid[:, :, :, span], keys[:, :, span], asked[:, span], present[:, :, span]
            )
        new = sums.gather(2, slot.clamp_min(0))
        store["looked_at"] = torch.where(slot >= 0, new, store["looked_at"])

    def _queries(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries at hand, their places from the first chunk that changes, and its start.

        ``[B, H, G, N, D]``, ``[B, N]`` (-1: none) and ``[B]``, both counted behind the sinks.
        """
        queries, live = step.query, step.live
        valid = torch.ones_like(step.positions, dtype=torch.bool) if live is None else live
        index = step.positions - self.sinks
        newest = index.masked_fill(~valid, torch.iinfo(index.dtype).max).amin(1)
        first = newest.clamp_min(0) // self.chunk * self.chunk
        if step.earlier is not None:
            before, positions, held = step.earlier
            queries = torch.cat([before, queries], 3)
            index = torch.cat([positions - self.sinks, index], 1)
            valid = torch.cat([held, valid], 1)
        place = index - first[:, None]
        return queries, place.masked_fill(~valid | (index < 0) | (place < 0), -1), first

    def score(self, step: Step, store: Store) -> Tensor:
        inside = before_window(store, self.recent) & (store["position"] >= self.sinks)
        weight = store["looked_at"] * store.values.float().norm(dim=-1)
        pooled = pool(weight, inside, 3, "avg")
        attention = standardise(pooled, inside, dim=(1, 2), correction=1)
        return self.blend * key_leverage(step, store, inside, self.sketch, self.seed) + attention


def _column_sums(queries: Tensor, keys: Tensor, asked: Tensor, present: Tensor) -> Tensor:
    """Attention that keys ``[B, H, C, D]`` get from ``[B, H, G, C, D]``, group mean, ``[B, H, C]``.

    ``asked [B, C]``: the queries there are; ``present [B, H, C]``: the keys.
    """
    logits = queries.float() @ keys.float()[:, :, None].transpose(-1, -2)
    weights = logits.masked_fill(~present[:, :, None, None], -torch.inf).softmax(-1)
    real = asked[:, None, None, :, None] & present.any(-1)[:, :, None, None, None]
    return weights.masked_fill(~real, 0.0).sum(3).mean(2)


@method(
    name="compactor",
    paper="Compactor",
    year=2025,
    arxiv="2507.08143",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def compactor(
    *,
    sinks: int = 8,
    recent: int = 4,
    chunk: int = 256,
    sketch: int = 48,
    blend: float = 0.35,
    seed: int = 0,
) -> Recipe:
    """``blend``: weight of leverage; ``chunk``: tokens that look at one another; ``sketch``."""
    scorer = Compactor(
        sinks=sinks, recent=recent, chunk=chunk, sketch=sketch, blend=blend, seed=seed
    )
    return Recipe(
        method="compactor", scorer=scorer, schedule=AfterPrefill(), sinks=sinks, recent=recent
    )
