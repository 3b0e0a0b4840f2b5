"""Measuring a model on calibration text: a scorer that watches every layer and scores nothing.

    mean, covariance   of queries before rotation, behind the first ``sinks`` tokens of a passage
    filter f           v: first right singular vector of the rotated queries, turned so that their
                       mean projects positively on it; f = mean of v over the group
    gate               sqrt( sum over t of ||o_t - s_t||^2 / sum over t of ||o_t||^2 ), at most 1

o_t: a head's attention output; s_t: its output if it saw its first and recent tokens only. The sums
go over a head's group and over the queries for which anything is hidden. Queries are never stored:
v is the main eigenvector of their second moment. In addition to the forward, O(T D^2) and, for the
gates, O(T S D) in time a layer; O(D^2) a query head in memory between passages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.moments import QueryMoments
from kvsieve.statistics import Identity, Statistics
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(kw_only=True)
class Measured:
    """One layer so far: moments of its queries, and per head the sums of its gate ``[H]``."""

    plain: QueryMoments
    rotated: QueryMoments
    apart: Tensor
    whole: Tensor

    def filter(self) -> Tensor:
        """Return the main direction of rotated queries ``[H, D]``, the mean over the group."""
        count, mean, spread = (
            x[0].double().cpu()
            for x in (self.rotated.count, self.rotated.mean, self.rotated.spread)
        )
        second = spread + count * mean[..., :, None] * mean[..., None, :]  # [H, G, D, D]
        main = torch.linalg.eigh(second).eigenvectors[..., -1]
        sign = torch.where((main * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return (sign * main).mean(1).float()


@dataclass(kw_only=True)
class Collector(ScorerDefaults):
    """Watches the forwards of single passages; ``first`` and ``recent``: what gates leave to see.

    Unlike a method's scorer it holds state: what it has seen of each layer.
    """

    sinks: int = 4
    first: int = 128
    recent: int = 256
    layers: dict[int, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.sinks, self.first) < 0 or self.recent < 1:
            raise RecipeError("calibrate: sinks and first are 0 or more, recent 1 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.PRE_ROPE, Signal.VALUES})

    def observe(self, step: Step, store: Store) -> None:
        """Take in a passage's forward through a layer."""
        ordinal, (_, H, *_) = step.layer.ordinal, step.query.shape
        if ordinal not in self.layers:
            self.layers[ordinal] = Measured(
                plain=QueryMoments.empty(step.query),
                rotated=QueryMoments.empty(step.query),
                apart=torch.zeros(H, dtype=torch.float64, device=step.query.device),
                whole=torch.zeros(H, dtype=torch.float64, device=step.query.device),
            )
        measured = self.layers[ordinal]
        measured.plain.take_in(step, self.sinks)
        measured.rotated.take_in(step, self.sinks, rotated=True)
        self._compare(step, store, measured)

    def score(self, step: Step, store: Store) -> Tensor:
        """Refuse: what is measured isn't compressed.

        Raises:
            RecipeError: always.
        """
        raise RecipeError("calibrate measures a model and compresses nothing: it has no scores.")

    def _compare(self, step: Step, store: Store, measured: Measured) -> None:
        """Add the outputs of queries from which something would be hidden, and what would miss."""
        B, H, G, T, _ = step.query.shape
        start = min(T, self.first + self.recent)
        values, slot = store.values.float()[:, :, None], store["position"][:, :, None]
        limit = layer_block(store.keys)
        for t0, t1 in query_blocks(T - start, B * H * G * store.slots, limit):
            span = slice(start + t0, start + t1)
            positions = step.positions[:, span]
            valid = torch.ones_like(positions, dtype=torch.bool)
            weights = step.weights(store, step.query[:, :, :, span], positions, valid)
            near = (slot < self.first) | (slot > positions[:, None, :, None] - self.recent)
            left = weights.masked_fill(~near[:, :, None], 0.0)  # [B, H, G, w, S]
            out = weights @ values
            share = left.sum(-1, keepdim=True)
            if step.sinks is not None:  # what learned sinks take, they take from both
                share = share + 1 - weights.sum(-1, keepdim=True)
            streamed = left @ values / share.clamp_min(torch.finfo(torch.float32).tiny)
            measured.apart += (out - streamed).double().square().sum((0, 2, 3, 4))
            measured.whole += out.double().square().sum((0, 2, 3, 4))

    def statistics(self, identity: Identity, **facts: Any) -> Statistics:
        """Return what was measured.

        Raises:
            RecipeError: fewer than two tokens behind the first ones of all passages.
        """
        layers = [self.layers[ordinal] for ordinal in sorted(self.layers)]
        count = int(layers[0].plain.count[0]) if layers else 0
        if count < 2:
            raise RecipeError(
                f"The text has {count} tokens behind the first {self.sinks} of its passages: "
                "too few to measure anything. Give more, or longer, text."
            )
        tensors = {
            "query_mean": torch.stack([x.plain.mean[0].cpu() for x in layers]),
            "query_covariance": torch.stack([x.plain.spread[0].cpu() for x in layers])
            / (count - 1),
            "query_filter": torch.stack([x.filter() for x in layers]),
        }
        facts |= {"sinks": self.sinks, "first": self.first, "recent": self.recent}
        if bool((layers[0].whole > 0).any()):
            ratio = torch.stack([x.apart / x.whole.clamp_min(1e-300) for x in layers])
            tensors["head_gate"] = ratio.sqrt().clamp(0, 1).float().cpu()
        else:
            facts["no_head_gate"] = (
                f"Head gates need passages of more than {self.first + self.recent} tokens. "
            )
        return Statistics(tensors=tensors, identity=identity, source="statistics", facts=facts)
