"""Budgets by importance of heads: shares (SurfaceLogicKV), or all or nothing (DuoAttention)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.interfaces import Round, Scope
from kvsieve.statistics import Statistics, needed

Table = tuple[tuple[float, ...], ...]
"""One number for each head of each layer."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Layers share the model's budget by their importance, heads share their layer's.

    ``surface``, ``logic``: how much each head of each layer copies, and gathers; None: both are
    taken from the scores, as the head's highest one and as the sum of the next ``spread``. With
    ``I = weight S / sum S + (1 - weight) L / sum L``, I_l its sum over a layer's heads, b the mean
    budget and b_min what every head keeps, a ``least``-th of b and its protected slots at least:

        B_l = H b_min + P ((1 - mu) / layers + mu I_l),   P = layers H (b - b_min)
        b_h = b_min + (B_l - H b_min) ((1 - nu) / H + nu I_h / I_l)

    rounded by largest remainder. What a head has no slots for goes to the others in proportion.
    """

    surface: Table | None = None
    logic: Table | None = None
    weight: float = 0.5
    mu: float = 0.5
    nu: float = 0.9
    least: float = 4.0
    spread: int = 8
    scope: Scope = Scope.MODEL

    def __post_init__(self) -> None:
        for name in ("weight", "mu", "nu"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}={getattr(self, name)}: it is a share from 0 to 1.")
        if self.least < 1 or self.spread < 1:
            raise RecipeError("least and spread must be 1 or more.")

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return each head's own count; together exactly the model's budget."""
        live = torch.stack(round.live, 1)  # [B, L, H]
        safe = torch.stack([x.isposinf().sum(-1) for x in scores], 1).cpu()
        least = (round.budgets / self.least).long()[:, None, None]
        floor = torch.maximum(least, safe).minimum(live)
        heads = live[0].numel()
        total = torch.minimum(round.budgets * heads, live.sum((1, 2)))
        share = self._share(scores, round)  # [B, L, H]
        rows = [
            divide(int(n), share[b].flatten(), floor[b].flatten(), live[b].flatten())
            for b, n in enumerate(total)
        ]
        return list(torch.stack(rows).view(live.shape).unbind(1))

    def _share(self, scores: list[Tensor], round: Round) -> Tensor:
        """Return each head's share of the free slots, ``[B, L, H]`` in fp64; a row adds up to 1."""
        surface, logic = self._behaviours(scores, round)
        importance = self.weight * _normal(surface) + (1 - self.weight) * _normal(logic)
        importance = _normal(importance)
        layer = importance.sum(2, keepdim=True)
        L, H = importance.shape[1:]
        inside = torch.where(layer > 0, importance / layer.clamp_min(1e-300), 1 / H)
        return ((1 - self.mu) / L + self.mu * layer) * ((1 - self.nu) / H + self.nu * inside)

    def _behaviours(self, scores: list[Tensor], round: Round) -> tuple[Tensor, Tensor]:
        if self.surface is None or self.logic is None:
            finite = [x.masked_fill(~x.isfinite(), 0.0).clamp_min(0) for x in scores]
            best = [x.topk(min(1 + self.spread, x.shape[-1])).values for x in finite]
            peak = torch.stack([x[..., 0] for x in best], 1)
            rest = torch.stack([x[..., 1:].sum(-1) for x in best], 1)
            return peak.double().cpu(), rest.double().cpu()
        shape = (round.layer_count, scores[0].shape[1])
        tables = [torch.tensor(x, dtype=torch.float64) for x in (self.surface, self.logic)]
        if any(table.shape != shape for table in tables):
            raise RecipeError(
                f"The head scores are for {[list(t.shape) for t in tables]} layers and heads, but "
                f"the model's compressed layers are {shape[0]}, of {shape[1]} KV heads. Measure "
                "them on this model."
            )
        rows = round.budgets.numel()
        return tables[0].expand(rows, -1, -1), tables[1].expand(rows, -1, -1)


def _normal(x: Tensor) -> Tensor:
    """Scale ``x [B, L, H]`` so that each row adds up to 1; a row of zeros becomes even."""
    total = x.sum((1, 2), keepdim=True)
    even = 1 / x[0].numel()
    return torch.where(total > 0, x / total.clamp_min(1e-300), even)


def divide(total: int, share: Tensor, floor: Tensor, most: Tensor) -> Tensor:
    """Divide ``total`` slots among heads: ``floor`` each, the rest by ``share``, at most ``most``.

    All ``[N]``, shares in fp64; returns int64 that adds up to ``total`` exactly, which must lie
    between the sums of ``floor`` and ``most``. Largest remainder; ties go to the earlier head.
    """
    quota = floor.double()
    while (spare := total - float(quota.sum())) > 1e-3:
        open_ = quota < most
        # Heads of no share are served last, evenly.
        part = torch.where(open_, share, 0.0)
        part = part if float(part.sum()) > 0 else open_.double()
        quota = torch.minimum(quota + spare * part / part.sum(), most.double())
    counts = (quota + 1e-6).floor()
    order = (quota - counts).masked_fill(counts >= most, -1.0).sort(descending=True, stable=True)
    counts[order.indices[: total - int(counts.sum())]] += 1
    return counts.long()


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads:
    """Retrieval heads keep everything, streaming heads what is protected (DuoAttention).

    In order of the model's ``head_gate`` (ties: the earlier head), heads keep all their slots until
    the model's budget is used; the one on the line keeps a part. Gates are known beforehand, so
    that each layer is decided by itself. (arXiv 2410.10819)
    """

    statistics: Statistics | None = None
    scope: Scope = Scope.HEAD

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return each head's own count; only which scores are protected is looked at."""
        place = self._place(round.layer_count, scores[0].shape[1])
        counts = []
        for layer, score, live in zip(round.layers, scores, round.live, strict=True):
            safe = score.isposinf().sum(-1).amax(1, keepdim=True).cpu()  # [B, 1]
            # What has passed, not what is left: a head that was cut before keeps its share.
            seen = live.amax(1) if round.seen is None else round.seen
            wanted = seen[:, None] - safe
            spare = (round.budgets[:, None] - safe) * place.numel()
            share = (spare - place[layer] * wanted).clamp_min(0).minimum(wanted)
            counts.append(torch.minimum(live, safe + share))
        return counts

    def _place(self, layers: int, heads: int) -> Tensor:
        """Return each head's place in the order of gates, ``[L, H]``."""
        given = needed(self.statistics, "duo-attention")
        cpu = torch.device("cpu")
        gates = torch.stack([given.of("head_gate", layer, cpu) for layer in range(layers)])
        order = gates.flatten().sort(descending=True, stable=True).indices
        return (
            torch.empty_like(order).scatter(0, order, torch.arange(len(order))).view(layers, heads)
        )
