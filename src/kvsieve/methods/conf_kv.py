"""CONF-KV: while the model is sure of its next token it keeps a small cache, else a large one
("CONF-KV", arXiv 2605.24786). The eviction part.

    c_t = mean of  (H_hi - H) / (H_hi - H_lo) clipped to [0, 1],  1 - exp(-(log p1 - log p2)),  p1
    B_t = round(B_min + (1 - c_t) (B_max - B_min))
    m_i = rho m_i + (1 - rho) a_i                         a_i: the step's attention, group mean
    score_i = lambda m_i / max_j m_j + (1 - lambda) exp(-(t - position_i) / tau)

H: entropy of the logits of the step before, p1, p2: its two likeliest tokens; weights of the three
signals: ``entropy``, ``margin``, ``top``. B_max: the budget, a cap. m starts as the mean attention
of the last ``window`` queries of the prompt, and of a new token as its own a_i. At each decode
step; the prompt is cut to B_max. A head is cut when it holds more than B_t + ``slack`` or B_max,
never below what is protected. What was evicted does not come back when B_t grows. O(S D) per step,
4 bytes a slot.

Differs from the paper: its formulas are not known; these follow secondary descriptions and our own
proposals. The logits of step t - 1 set the budget that step t applies, when its token is stored.
INT8 storage of what is older than the ``recent`` tokens is not included, nor smaller budgets in
upper layers: this part reads attention weights and counts slots, however these are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.allocators import ByConfidence
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, ScorerDefaults, Signal
from kvsieve.packing import live_slots
from kvsieve.prediction import Confidence
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, EachStep
from kvsieve.scoring import divide_by_peak, window_mean
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class MassAndRecency(ScorerDefaults):
    """Smoothed attention and age, ``[B, H, S]``; keeps m in column ``mass`` (-1: none yet)."""

    queries: int
    mass: float
    smoothing: float
    reach: float

    def __post_init__(self) -> None:
        if not (0 <= self.mass <= 1 and 0 <= self.smoothing < 1 and self.reach > 0):
            raise RecipeError(
                "conf-kv: mass is a share from 0 to 1, smoothing one below 1, reach above 0."
            )
        if self.queries < 1:
            raise RecipeError(f"conf-kv: window={self.queries}; it must hold 1 query or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.ATTENTION_SUMS})

    @property
    def window(self) -> int:
        return self.queries

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="mass", fill=-1.0),)

    def observe(self, step: Step, store: Store) -> None:
        old = store["mass"]
        if step.prefill:
            new = window_mean(step, store, self.queries).mean(2)
        else:
            seen = step.attention_sums(store)  # [B, H, S]
            new = torch.where(old < 0, seen, self.smoothing * old + (1 - self.smoothing) * seen)
        if step.live is not None:  # a row that is fed padding only stays as it is
            new = torch.where(step.live.any(1)[:, None, None], new, old)
        store["mass"] = new

    def score(self, step: Step, store: Store) -> Tensor:
        mass = divide_by_peak(store["mass"], live_slots(store))
        age = (store.seen - 1).to(mass.device)[:, None, None] - store["position"]
        return self.mass * mass + (1 - self.mass) * torch.exp(-age / self.reach)


@method(
    name="conf-kv",
    paper="CONF-KV",
    year=2026,
    arxiv="2605.24786",
    certainty="secondary description",
)
def conf_kv(
    *,
    least: int | float = 0.25,
    slack: int = 16,
    mass: float = 0.7,
    smoothing: float = 0.9,
    reach: float = 1024.0,
    window: int = 32,
    entropy: float = 1.0,
    margin: float = 1.0,
    top: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    sinks: int = 4,
    recent: int = 64,
) -> Recipe:
    """``least``: B_min; ``slack``: slots above B_t before it is cut; ``mass``: lambda;
    ``smoothing``: rho; ``reach``: tau, in tokens; ``window``: queries at the end of the prompt;
    ``entropy``, ``margin``, ``top``: weights; ``low``, ``high``: H_lo, H_hi in nats (0: log V).
    """
    return Recipe(
        method="conf-kv",
        scorer=MassAndRecency(queries=window, mass=mass, smoothing=smoothing, reach=reach),
        allocator=ByConfidence(
            least=least,
            slack=slack,
            confidence=Confidence(entropy=entropy, margin=margin, top=top, low=low, high=high),
        ),
        schedule=AfterPrefill() | EachStep(),
        sinks=sinks,
        recent=recent,
    )
