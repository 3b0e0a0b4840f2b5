"""How many slots each head keeps: any threshold or global top-k is "counts" plus "top-k inside".

Every allocator returns exact counts: a layer's counts add up to at most heads x budget, a model's
to at most layers x heads x budget, whatever ties there are (they break by index).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsieve.errors import BudgetError, RecipeError
from kvsieve.interfaces import Allocator, Round, Scope, Signal
from kvsieve.prediction import Confidence

CONDEMNED = torch.finfo(torch.float32).min
"""What a score of -inf has become when an allocator sees it: above what does not exist."""


@dataclass(frozen=True)
class Uniform:
    """Every head of every layer keeps the same number of slots."""

    scope: Scope = Scope.HEAD

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return ``min(budget, live)`` for every head; scores are not looked at."""
        return [torch.minimum(live, round.budgets[:, None]) for live in round.live]


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Budgets fall linearly from the first to the last layer (PyramidKV, arXiv 2406.02069).

    With c the mean budget, W the window, n slots in the layer:
    ``least = (c - W) / beta``, ``most = 2 (c - W) - least``; where ``most > n - W`` it is cut to
    ``n - W`` and ``least`` takes the rest. Layer l keeps ``W + most - l (most - least) / (L - 1)``,
    rounded so that all layers together keep exactly ``L c``.
    """

    beta: float = 20.0
    scope: Scope = Scope.HEAD

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise RecipeError(f"Pyramid(beta={self.beta}): beta must be 1 or more.")

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return each layer's own budget, the same for its heads."""
        counts = []
        for layer, live in zip(round.layers, round.live, strict=True):
            # What has passed, not what is left: a layer that was cut before keeps its share.
            slots = (live.amax(1) if round.seen is None else round.seen).tolist()
            budgets = [
                self.layer_budget(layer, round.layer_count, int(c), n, round.window)
                for c, n in zip(round.budgets.tolist(), slots, strict=True)
            ]
            counts.append(torch.minimum(live, torch.tensor(budgets)[:, None]))
        return counts

    def layer_budget(self, layer: int, layers: int, mean: int, slots: int, window: int) -> int:
        """Return the slots per head of one layer, the window included."""
        free = mean - window
        if layers == 1 or free <= 0 or slots <= mean:
            return mean
        most = min(2 * free - free / self.beta, slots - window)
        least = 2 * free - most
        slope = (most - least) / (layers - 1)

        def total_before(upto: int) -> int:
            # Rounded running totals: the layers add up to L c exactly.
            return int(upto * most - slope * upto * (upto - 1) / 2 + 1e-6)

        return window + total_before(layer + 1) - total_before(layer)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """One top-k over all heads of a layer, or of the model; heads share unevenly.

    ``floor``: every head keeps at least the share ``floor`` of the mean budget, taken from its
    own best slots (AdaKV's safeguard, arXiv 2407.11550; 0.2 in the paper).
    """

    scope: Scope = Scope.LAYER
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.scope is Scope.HEAD:
            raise RecipeError("TopK over one head is Uniform; use scope LAYER or MODEL.")
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"TopK(floor={self.floor}): the floor is a share from 0 to 1.")

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Count how many of the scope's best ``heads x budget`` slots each head owns."""
        raised = [self._raise_floor(score, round) for score in scores]
        flat = torch.cat([score.flatten(1) for score in raised], 1)
        heads = sum(score.shape[1] for score in scores)
        live = torch.stack([count.sum(1) for count in round.live]).sum(0)
        allowed = torch.minimum(round.budgets * heads, live)
        chosen = top_mask(flat, allowed.to(flat.device))
        parts = chosen.split([score[0].numel() for score in scores], 1)
        return [
            part.view(score.shape).sum(-1).cpu() for part, score in zip(parts, scores, strict=True)
        ]

    def _raise_floor(self, score: Tensor, round: Round) -> Tensor:
        guaranteed = (round.budgets * self.floor).long()
        if not bool((guaranteed > 0).any()):
            return score
        safe = top_mask(score, guaranteed.to(score.device)[:, None])
        return score.masked_fill(safe & (score > -torch.inf), torch.inf)


@dataclass(frozen=True)
class LazyLayers:
    """Layers in need keep everything, lazy ones what is protected (SimLayerKV, arXiv 2410.13846).

    A layer's need is its highest score that isn't protected. In order of need (ties: the earlier
    layer), layers keep all their slots until the model's budget is used; the one on the line keeps
    a part. Heads of a layer keep equal numbers, and must hold equal numbers.
    """

    scope: Scope = Scope.MODEL

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return each layer's own count, the same for its heads."""
        protected = [score.isposinf() for score in scores]
        need = torch.stack(
            [
                x.masked_fill(p, -torch.inf).amax((1, 2))
                for x, p in zip(scores, protected, strict=True)
            ]
        )  # [L, B]
        safe = torch.stack([p.sum(-1).amax(1) for p in protected]).cpu()
        order = need.sort(dim=0, descending=True, stable=True).indices.cpu()
        live = torch.stack([count.amax(1) for count in round.live])
        wanted = (live - safe).gather(0, order)
        spare = round.budgets * len(scores) - safe.sum(0) - (wanted.cumsum(0) - wanted)
        counts = safe.scatter_add(0, order, spare.clamp_min(0).minimum(wanted))
        return [torch.minimum(n[:, None], x) for n, x in zip(counts, round.live, strict=True)]


class Dynamic:
    """An allocator that chooses: the budget is a cap, below which it may keep less.

    Its rows are looked at whenever the schedule is due, not only above the cap.
    """

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    @property
    def uneven(self) -> bool:
        """Whether heads of a layer may be given unequal numbers."""
        return False

    def check(self, budget: int) -> None:
        """Refuse a cap of so many slots that can't be kept to.

        Raises:
            BudgetError: says what is the least.
        """


@dataclass(frozen=True, kw_only=True)
class Threshold(Dynamic):
    """Drop what scores below ``least``, and what a scorer condemned (-inf), wherever it is.

    ``within`` gives each head its share of the cap. A head keeps one slot at least.
    """

    least: float = -torch.inf
    within: Allocator = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not self.least < torch.inf:
            raise RecipeError(f"Threshold(least={self.least}): nothing but a number keeps a slot.")

    @property
    def scope(self) -> Scope:
        return self.within.scope

    @property
    def uneven(self) -> bool:
        return self.least > -torch.inf or isinstance(self.within, TopK)

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Count the slots of each head that are good enough, as far as the cap allows."""
        allowed = self.within.allocate(scores, round)
        good = [((x > CONDEMNED) & (x >= self.least)).sum(-1).cpu() for x in scores]
        return [torch.minimum(a, n.clamp_min(1)) for a, n in zip(allowed, good, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ByConfidence(Dynamic):
    """Between ``least`` and the cap, the less the surer the model was of its last token (CONF-KV).

    ``B_t = round(B_min + (1 - c_t) (B_max - B_min))``; c: the row's ``confidence``, B_min:
    ``least``, slots or (as a float) a share of the cap B_max. A head is cut when it holds more than
    ``B_t + slack``, or than the cap; in a prompt, before any logits, to the cap.
    """

    least: int | float = 0.25
    slack: int = 16
    confidence: Confidence = field(default_factory=Confidence)
    scope: Scope = Scope.HEAD

    def __post_init__(self) -> None:
        share = isinstance(self.least, float)
        if not self.least > 0 or (share and self.least > 1):
            raise RecipeError(f"least={self.least}: give slots (int), or a share up to 1.0.")
        if self.slack < 0:
            raise RecipeError(f"slack={self.slack}: it can't be negative.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.LOGITS})

    def check(self, budget: int) -> None:
        """Refuse a cap below ``least``."""
        if isinstance(self.least, int) and self.least > budget:
            raise BudgetError(
                f"This method keeps {self.least} slots at least (option least), more than the "
                f"budget of {budget}, its cap. Raise the budget, or lower least (a float is a "
                "share of the budget)."
            )

    def target(self, round: Round) -> Tensor:
        """Return B_t of each row, ``[B]`` int64."""
        if round.prediction is None:
            return round.budgets
        most = round.budgets.double()
        share = isinstance(self.least, float)
        least = (most * self.least).floor().clamp_min(1) if share else most.clamp_max(self.least)
        doubt = 1 - self.confidence.of(round.prediction).double()
        return (least + doubt * (most - least)).round().long()

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return B_t for heads that hold too much, and what they hold for the others.

        What is protected always stays.
        """
        cap, target = round.budgets[:, None], self.target(round)[:, None]
        counts = []
        for score, live in zip(scores, round.live, strict=True):
            wanted = target.maximum(score.isposinf().sum(-1).cpu()).minimum(cap)
            limit = (wanted + self.slack).minimum(cap)
            counts.append(torch.where(live > limit, wanted, live))
        return counts


def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the ``counts`` highest entries along the last axis; ties go to the earlier index.

    ``scores [..., S]``, ``counts [...]`` (broadcastable to the leading axes) -> bool ``[..., S]``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    inside = (rank < counts.unsqueeze(-1)).expand(scores.shape)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, inside)
